// The portable level: plain C++ on four-element vectors of the compiler, which the platform's baseline turns into
// whatever it has (SSE2 on x86-64). No fused multiply-add here: the product is rounded before the sum, so l2, lp
// and cosine may differ from the other levels in the last bits (l1 does not).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/halves.h"

namespace honeytrace::HONEYTRACE_LEVEL {

constexpr int kRegisterFloats = 4;
typedef float Reg __attribute__((vector_size(16)));
typedef int32_t RegInt __attribute__((vector_size(16)));
using RegMask = RegInt;

#define HT_INLINE HONEYTRACE_HD
HT_INLINE RegInt reg_as_int(Reg a) { return (RegInt)a; }
HT_INLINE Reg int_as_reg(RegInt a) { return (Reg)a; }
HT_INLINE Reg reg_load(const float* p) {
    Reg a;
    memcpy(&a, p, sizeof a);
    return a;
}
HT_INLINE void reg_store(float* p, Reg a) { memcpy(p, &a, sizeof a); }
HT_INLINE Reg reg_set(float x) { return Reg{x, x, x, x}; }
HT_INLINE Reg reg_add(Reg a, Reg b) { return a + b; }
HT_INLINE Reg reg_sub(Reg a, Reg b) { return a - b; }
HT_INLINE Reg reg_sub_spread(Reg a, const float* b) { return reg_sub(a, reg_set(*b)); }
HT_INLINE Reg reg_mul(Reg a, Reg b) { return a * b; }
HT_INLINE Reg reg_div(Reg a, Reg b) { return a / b; }
HT_INLINE Reg reg_fma(Reg a, Reg b, Reg c) { return a * b + c; }
HT_INLINE RegMask reg_less(Reg a, Reg b) { return a < b; }
HT_INLINE Reg reg_select(RegMask m, Reg yes, Reg no) { return (Reg)((m & (RegInt)yes) | (~m & (RegInt)no)); }
HT_INLINE Reg reg_min(Reg a, Reg b) { return reg_select(a < b, a, b); }
HT_INLINE Reg reg_max(Reg a, Reg b) { return reg_select(a > b, a, b); }
HT_INLINE Reg reg_abs(Reg a) { return (Reg)((RegInt)a & 0x7FFFFFFF); }
HT_INLINE Reg reg_sqrt(Reg a) { return Reg{sqrtf(a[0]), sqrtf(a[1]), sqrtf(a[2]), sqrtf(a[3])}; }
// For |a| below 2^22: adding 1.5 * 2^23 leaves no room for a fraction.
HT_INLINE Reg reg_round(Reg a) { return (a + 12582912.0f) - 12582912.0f; }
HT_INLINE Reg reg_add_abs(Reg d, Reg sum) { return reg_abs(d) + sum; }
HT_INLINE uint32_t reg_bits(RegMask m) {
    return (m[0] & 1u) | ((m[1] & 1u) << 1) | ((m[2] & 1u) << 2) | ((m[3] & 1u) << 3);
}
HT_INLINE RegInt int_set(int32_t x) { return RegInt{x, x, x, x}; }
HT_INLINE RegInt int_add(RegInt a, RegInt b) { return a + b; }
HT_INLINE RegInt int_sub(RegInt a, RegInt b) { return a - b; }
HT_INLINE RegInt int_and(RegInt a, RegInt b) { return a & b; }
template <int N>
HT_INLINE RegInt int_shift_left(RegInt a) {
    typedef uint32_t Unsigned __attribute__((vector_size(16)));
    return (RegInt)((Unsigned)a << N);
}
template <int N>
HT_INLINE RegInt int_shift_right(RegInt a) {
    return a >> N;
}
HT_INLINE RegInt int_from(Reg a) { return __builtin_convertvector(a, RegInt); }
HT_INLINE Reg reg_from(RegInt a) { return __builtin_convertvector(a, Reg); }
HT_INLINE Reg reg_load_float16(const uint16_t* p) {
    return Reg{float_from_float16(p[0]), float_from_float16(p[1]), float_from_float16(p[2]), float_from_float16(p[3])};
}
HT_INLINE Reg reg_load_bfloat16(const uint16_t* p) {
    return Reg{float_from_bfloat16(p[0]), float_from_bfloat16(p[1]), float_from_bfloat16(p[2]),
               float_from_bfloat16(p[3])};
}
HT_INLINE Reg reg_load_part(const float* p, int n, float rest) {
    float lane[kRegisterFloats];
    for (int j = 0; j < kRegisterFloats; ++j) lane[j] = j < n ? p[j] : rest;
    return reg_load(lane);
}
HT_INLINE void reg_store_part(float* p, int n, Reg a) {
    float lane[kRegisterFloats];
    reg_store(lane, a);
    for (int j = 0; j < n; ++j) p[j] = lane[j];
}
HT_INLINE void reg_store_float16(uint16_t* p, Reg a) {
    for (int j = 0; j < kRegisterFloats; ++j) p[j] = float16_from_float(a[j]);
}
// The upper halves of 32-bit words.
HT_INLINE void int_store_high(uint16_t* p, RegInt a) {
    for (int j = 0; j < kRegisterFloats; ++j) p[j] = static_cast<uint16_t>(static_cast<uint32_t>(a[j]) >> 16);
}

}  // namespace honeytrace::HONEYTRACE_LEVEL
