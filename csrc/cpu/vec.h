// Lanes: 16 floats, whatever the register size. Every kernel is written once, on Lanes.
//
// Include it after one of vec_<level>.h, which gives the register type and its operations. Because all levels
// work on the same 16 lanes in the same order, the levels that have a fused multiply-add (avx2, avx512, neon)
// give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/halves.h"
#include "cpu/kernels.h"

namespace honeytrace::HONEYTRACE_LEVEL {

constexpr int kRegisters = kLanes / kRegisterFloats;

#define HT_EACH_REGISTER _Pragma("GCC unroll 4") for (int i = 0; i < kRegisters; ++i)

struct Lanes {
    Reg r[kRegisters];
    Lanes() = default;
    HT_INLINE explicit Lanes(float x) { HT_EACH_REGISTER r[i] = reg_set(x); }
};
struct LaneMask {
    RegMask r[kRegisters];
};

#define HT_BINARY(name, op)                             \
    HT_INLINE Lanes name(Lanes a, Lanes b) {            \
        Lanes out;                                      \
        HT_EACH_REGISTER out.r[i] = op(a.r[i], b.r[i]); \
        return out;                                     \
    }
#define HT_UNARY(name, op)                      \
    HT_INLINE Lanes name(Lanes a) {             \
        Lanes out;                              \
        HT_EACH_REGISTER out.r[i] = op(a.r[i]); \
        return out;                             \
    }

HT_BINARY(add, reg_add)
HT_BINARY(sub, reg_sub)
HT_BINARY(mul, reg_mul)
HT_BINARY(divide, reg_div)
HT_BINARY(minimum, reg_min)
HT_BINARY(maximum, reg_max)
HT_BINARY(add_abs, reg_add_abs)  // |a| + b
HT_UNARY(absolute, reg_abs)
HT_UNARY(square_root, reg_sqrt)
HT_UNARY(round_even, reg_round)

HT_INLINE Lanes load(const float* p) {
    Lanes out;
    HT_EACH_REGISTER out.r[i] = reg_load(p + i * kRegisterFloats);
    return out;
}
HT_INLINE void store(float* p, Lanes a) { HT_EACH_REGISTER reg_store(p + i * kRegisterFloats, a.r[i]); }
HT_INLINE Lanes fill(float x) { return Lanes(x); }
// One float in memory that stands for all lanes.
struct Spread {
    const float* value;
};
HT_INLINE Lanes sub(Lanes a, Spread b) {
    Lanes out;
    HT_EACH_REGISTER out.r[i] = reg_sub_spread(a.r[i], b.value);
    return out;
}
HT_INLINE Lanes maximum(Lanes a, Spread b) { return maximum(a, fill(*b.value)); }
// a * b + c, rounded once where the level can.
HT_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) {
    Lanes out;
    HT_EACH_REGISTER out.r[i] = reg_fma(a.r[i], b.r[i], c.r[i]);
    return out;
}
HT_INLINE Lanes fma(Lanes a, Spread b, Lanes c) { return fma(a, fill(*b.value), c); }
HT_INLINE LaneMask less(Lanes a, Lanes b) {
    LaneMask out;
    HT_EACH_REGISTER out.r[i] = reg_less(a.r[i], b.r[i]);
    return out;
}
HT_INLINE Lanes select(LaneMask m, Lanes yes, Lanes no) {
    Lanes out;
    HT_EACH_REGISTER out.r[i] = reg_select(m.r[i], yes.r[i], no.r[i]);
    return out;
}
// Bit j is lane j.
HT_INLINE uint32_t bits(LaneMask m) {
    uint32_t out = 0;
    HT_EACH_REGISTER out |= reg_bits(m.r[i]) << (i * kRegisterFloats);
    return out;
}
HT_INLINE Lanes load_float16(const uint16_t* p) {
    Lanes out;
    HT_EACH_REGISTER out.r[i] = reg_load_float16(p + i * kRegisterFloats);
    return out;
}
HT_INLINE Lanes load_bfloat16(const uint16_t* p) {
    Lanes out;
    HT_EACH_REGISTER out.r[i] = reg_load_bfloat16(p + i * kRegisterFloats);
    return out;
}
// 2^n for whole n in [-126, 127].
HT_INLINE Lanes power_of_two(Lanes n) {
    Lanes out;
    HT_EACH_REGISTER out.r[i] = int_as_reg(int_shift_left<23>(int_add(int_from(n.r[i]), int_set(127))));
    return out;
}
// x = mantissa * 2^exponent with the mantissa in [sqrt(1/2), sqrt(2)), for positive normal x.
HT_INLINE void split_exponent(Lanes x, Lanes* mantissa, Lanes* exponent) {
    const RegInt root_half = int_set(0x3F3504F3);
    HT_EACH_REGISTER {
        const RegInt above = int_sub(reg_as_int(x.r[i]), root_half);
        const RegInt power = int_shift_right<23>(above);
        exponent->r[i] = reg_from(power);
        mantissa->r[i] = int_as_reg(int_sub(reg_as_int(x.r[i]), int_shift_left<23>(power)));
    }
}

// Sum and maximum over the lanes in one fixed order.
HT_INLINE float sum_lanes(Lanes a) {
    float lane[kLanes];
    store(lane, a);
    for (size_t width = kLanes / 2; width > 0; width /= 2)
        for (size_t j = 0; j < width; ++j) lane[j] += lane[j + width];
    return lane[0];
}
HT_INLINE float max_lanes(Lanes a) {
    float lane[kLanes];
    store(lane, a);
    float largest = lane[0];
    for (size_t j = 1; j < kLanes; ++j) largest = lane[j] > largest ? lane[j] : largest;
    return largest;
}

HT_INLINE int part_of_register(size_t n, int i) {
    const int left = static_cast<int>(n) - i * kRegisterFloats;
    return left < 0 ? 0 : (left < kRegisterFloats ? left : kRegisterFloats);
}
// The first n <= 16 floats at p; the other lanes hold `rest`, and nothing beyond the n is touched.
HT_INLINE Lanes load_part(const float* p, size_t n, float rest) {
    Lanes out;
    HT_EACH_REGISTER {
        const int part = part_of_register(n, i);
        out.r[i] = part == kRegisterFloats ? reg_load(p + i * kRegisterFloats)
                                           : reg_load_part(p + (part > 0 ? i * kRegisterFloats : 0), part, rest);
    }
    return out;
}
HT_INLINE void store_part(float* p, size_t n, Lanes a) {
    HT_EACH_REGISTER {
        const int part = part_of_register(n, i);
        if (part > 0) reg_store_part(p + i * kRegisterFloats, part, a.r[i]);
    }
}
// To nearest, ties to even; the values are within the type's finite range.
HT_INLINE void store_float16(uint16_t* p, Lanes a) {
    HT_EACH_REGISTER reg_store_float16(p + i * kRegisterFloats, a.r[i]);
}
HT_INLINE void store_bfloat16(uint16_t* p, Lanes a) {
    HT_EACH_REGISTER {
        const RegInt word = reg_as_int(a.r[i]);
        const RegInt odd = int_and(int_shift_right<16>(word), int_set(1));
        int_store_high(p + i * kRegisterFloats, int_add(int_add(word, int_set(0x7FFF)), odd));
    }
}

#undef HT_BINARY
#undef HT_UNARY

}  // namespace honeytrace::HONEYTRACE_LEVEL
