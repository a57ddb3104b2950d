// One float with the operations that core/metrics.h and core/transcendental.h want of a value: cpu/vec.h for a thread.
// Products and sums are rounded one by one; only fma() fuses (the compiler is told so: -fmad=false).
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/simt.h"
// After simt.h, which names the level.
#include "core/halves.h"

namespace honeytrace::device {

struct Scalar {
    float value;
    Scalar() = default;
    HONEYTRACE_HD explicit Scalar(float x) : value(x) {}
};

HONEYTRACE_HD int min_of(int a, int b) { return a < b ? a : b; }

HONEYTRACE_HD Scalar add(Scalar a, Scalar b) { return Scalar(a.value + b.value); }
HONEYTRACE_HD Scalar sub(Scalar a, Scalar b) { return Scalar(a.value - b.value); }
HONEYTRACE_HD Scalar mul(Scalar a, Scalar b) { return Scalar(a.value * b.value); }
HONEYTRACE_HD Scalar divide(Scalar a, Scalar b) { return Scalar(a.value / b.value); }
HONEYTRACE_HD Scalar fma(Scalar a, Scalar b, Scalar c) { return Scalar(fmaf(a.value, b.value, c.value)); }
HONEYTRACE_HD Scalar absolute(Scalar a) { return Scalar(fabsf(a.value)); }
HONEYTRACE_HD Scalar add_abs(Scalar a, Scalar b) { return Scalar(fabsf(a.value) + b.value); }
HONEYTRACE_HD Scalar minimum(Scalar a, Scalar b) { return a.value < b.value ? a : b; }
HONEYTRACE_HD Scalar maximum(Scalar a, Scalar b) { return a.value > b.value ? a : b; }
HONEYTRACE_HD Scalar square_root(Scalar a) { return Scalar(sqrtf(a.value)); }
HONEYTRACE_HD bool less(Scalar a, Scalar b) { return a.value < b.value; }
HONEYTRACE_HD Scalar select(bool mask, Scalar yes, Scalar no) { return mask ? yes : no; }
// For |a| below 2^22: adding 1.5 * 2^23 leaves no room for a fraction.
HONEYTRACE_HD Scalar round_even(Scalar a) { return Scalar((a.value + 12582912.0f) - 12582912.0f); }
// 2^n for whole n in [-126, 127].
HONEYTRACE_HD Scalar power_of_two(Scalar n) {
    return Scalar(float_of(static_cast<uint32_t>(static_cast<int32_t>(n.value) + 127) << 23));
}
// x = mantissa * 2^exponent with the mantissa in [sqrt(1/2), sqrt(2)), for positive normal x.
HONEYTRACE_HD void split_exponent(Scalar x, Scalar* mantissa, Scalar* exponent) {
    const int32_t power = static_cast<int32_t>(bits_of(x.value) - 0x3F3504F3u) >> 23;
    exponent->value = static_cast<float>(power);
    mantissa->value = float_of(bits_of(x.value) - (static_cast<uint32_t>(power) << 23));
}

}  // namespace honeytrace::device

#include "core/metrics.h"
#include "core/transcendental.h"
