// NEON (AArch64): four registers of 4 floats make the 16 lanes.
//
// | instruction  | used for                       | Neoverse N1: latency, per cycle |
// |--------------|--------------------------------|---------------------------------|
// | fabd v.4s    | |q - b| in one instruction     | 2, 2                            |
// | fadd v.4s    | |d| + sum                      | 2, 2                            |
// | fmla v.4s    | d * d + sum                    | 4, 2                            |
// | ld1r v.4s    | one query feature to all rows  | load port                       |
// (figures from Arm's Neoverse N1 software optimisation guide)
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "core/hd.h"

namespace honeytrace::HONEYTRACE_LEVEL {

constexpr int kRegisterFloats = 4;
using Reg = float32x4_t;
using RegMask = uint32x4_t;
using RegInt = int32x4_t;

#define HT_INLINE HONEYTRACE_HD
HT_INLINE Reg reg_load(const float* p) { return vld1q_f32(p); }
HT_INLINE void reg_store(float* p, Reg a) { vst1q_f32(p, a); }
HT_INLINE Reg reg_set(float x) { return vdupq_n_f32(x); }
HT_INLINE Reg reg_add(Reg a, Reg b) { return vaddq_f32(a, b); }
HT_INLINE Reg reg_sub(Reg a, Reg b) { return vsubq_f32(a, b); }
HT_INLINE Reg reg_sub_spread(Reg a, const float* b) { return reg_sub(a, reg_set(*b)); }
HT_INLINE Reg reg_mul(Reg a, Reg b) { return vmulq_f32(a, b); }
HT_INLINE Reg reg_div(Reg a, Reg b) { return vdivq_f32(a, b); }
HT_INLINE Reg reg_fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
HT_INLINE Reg reg_min(Reg a, Reg b) { return vminq_f32(a, b); }
HT_INLINE Reg reg_max(Reg a, Reg b) { return vmaxq_f32(a, b); }
HT_INLINE Reg reg_abs(Reg a) { return vabsq_f32(a); }
HT_INLINE Reg reg_sqrt(Reg a) { return vsqrtq_f32(a); }
HT_INLINE Reg reg_round(Reg a) { return vrndnq_f32(a); }
// |d| + sum; the compiler joins the subtraction before it and this absolute value to one fabd.
HT_INLINE Reg reg_add_abs(Reg d, Reg sum) { return vaddq_f32(vabsq_f32(d), sum); }
HT_INLINE RegMask reg_less(Reg a, Reg b) { return vcltq_f32(a, b); }
HT_INLINE Reg reg_select(RegMask m, Reg yes, Reg no) { return vbslq_f32(m, yes, no); }
HT_INLINE uint32_t reg_bits(RegMask m) {
    const uint32_t weights[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(m, vld1q_u32(weights)));
}
HT_INLINE RegInt reg_as_int(Reg a) { return vreinterpretq_s32_f32(a); }
HT_INLINE Reg int_as_reg(RegInt a) { return vreinterpretq_f32_s32(a); }
HT_INLINE RegInt int_set(int32_t x) { return vdupq_n_s32(x); }
HT_INLINE RegInt int_add(RegInt a, RegInt b) { return vaddq_s32(a, b); }
HT_INLINE RegInt int_sub(RegInt a, RegInt b) { return vsubq_s32(a, b); }
HT_INLINE RegInt int_and(RegInt a, RegInt b) { return vandq_s32(a, b); }
template <int N>
HT_INLINE RegInt int_shift_left(RegInt a) {
    return vshlq_n_s32(a, N);
}
template <int N>
HT_INLINE RegInt int_shift_right(RegInt a) {
    return vshrq_n_s32(a, N);
}
HT_INLINE RegInt int_from(Reg a) { return vcvtnq_s32_f32(a); }
HT_INLINE Reg reg_from(RegInt a) { return vcvtq_f32_s32(a); }
HT_INLINE Reg reg_load_float16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
HT_INLINE Reg reg_load_bfloat16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
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
HT_INLINE void reg_store_float16(uint16_t* p, Reg a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
// The upper halves of 32-bit words.
HT_INLINE void int_store_high(uint16_t* p, RegInt a) { vst1_u16(p, vshrn_n_u32(vreinterpretq_u32_s32(a), 16)); }

}  // namespace honeytrace::HONEYTRACE_LEVEL
