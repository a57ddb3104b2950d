// AVX-512 (F, BW, VL, DQ): one register of 16 floats.
//
// | instruction       | used for                        | Zen 4: latency, per cycle | Ice Lake: latency, ports |
// |-------------------|---------------------------------|---------------------------|--------------------------|
// | vsubps zmm        | q - b                           | 3, 1 (add pipes)          | 4, p0 p5                 |
// | vandps zmm        | absolute value                  | 1, 2                      | 1, p0 p5                 |
// | vfmadd zmm        | d * d + sum, |d| * 1 + sum      | 4, 1 (multiply pipes)     | 4, p0 p5                 |
// | vbroadcastss zmm  | one query feature to all rows   | load port                 | load port                |
// | vcmpps k          | rows below the k-th distance    | 4, 1                      | 3, p5                    |
// | vrndscaleps zmm   | exponent of exp and pow         | 4, 1                      | 8, p0 p5                 |
// (figures as published by the makers and by uops.info)
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/hd.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own intrinsics start from a register left undefined on purpose, and GCC warns of it (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace honeytrace::HONEYTRACE_LEVEL {

constexpr int kRegisterFloats = 16;
using Reg = __m512;
using RegMask = __mmask16;
using RegInt = __m512i;

#define HT_INLINE HONEYTRACE_HD
HT_INLINE Reg reg_load(const float* p) { return _mm512_loadu_ps(p); }
HT_INLINE void reg_store(float* p, Reg a) { _mm512_storeu_ps(p, a); }
HT_INLINE Reg reg_set(float x) { return _mm512_set1_ps(x); }
HT_INLINE Reg reg_add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
HT_INLINE Reg reg_sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
// a - *b. A broadcast into a register takes a slot of the arithmetic pipes on Zen 4, one in the operand of the
// subtraction takes none: 59 against 40 G differences/s squared and summed. Compilers prefer the first; hence the asm.
HT_INLINE Reg reg_sub_spread(Reg a, const float* b) {
    Reg out;
    __asm__("vsubps %2%{1to16%}, %1, %0" : "=v"(out) : "v"(a), "m"(*b));
    return out;
}
HT_INLINE Reg reg_mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
HT_INLINE Reg reg_div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
HT_INLINE Reg reg_fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
HT_INLINE Reg reg_min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
HT_INLINE Reg reg_max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
HT_INLINE Reg reg_abs(Reg a) { return _mm512_abs_ps(a); }
HT_INLINE Reg reg_sqrt(Reg a) { return _mm512_sqrt_ps(a); }
HT_INLINE Reg reg_round(Reg a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// |d| + sum. As |d| * 1 + sum it runs on the multiply pipes, which the subtraction leaves idle; same bits.
HT_INLINE Reg reg_add_abs(Reg d, Reg sum) { return _mm512_fmadd_ps(_mm512_abs_ps(d), _mm512_set1_ps(1.0f), sum); }
HT_INLINE RegMask reg_less(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
HT_INLINE Reg reg_select(RegMask m, Reg yes, Reg no) { return _mm512_mask_blend_ps(m, no, yes); }
HT_INLINE uint32_t reg_bits(RegMask m) { return m; }
HT_INLINE RegInt reg_as_int(Reg a) { return _mm512_castps_si512(a); }
HT_INLINE Reg int_as_reg(RegInt a) { return _mm512_castsi512_ps(a); }
HT_INLINE RegInt int_set(int32_t x) { return _mm512_set1_epi32(x); }
HT_INLINE RegInt int_add(RegInt a, RegInt b) { return _mm512_add_epi32(a, b); }
HT_INLINE RegInt int_sub(RegInt a, RegInt b) { return _mm512_sub_epi32(a, b); }
HT_INLINE RegInt int_and(RegInt a, RegInt b) { return _mm512_and_si512(a, b); }
template <int N>
HT_INLINE RegInt int_shift_left(RegInt a) {
    return _mm512_slli_epi32(a, N);
}
template <int N>
HT_INLINE RegInt int_shift_right(RegInt a) {
    return _mm512_srai_epi32(a, N);
}
HT_INLINE RegInt int_from(Reg a) { return _mm512_cvtps_epi32(a); }
HT_INLINE Reg reg_from(RegInt a) { return _mm512_cvtepi32_ps(a); }
HT_INLINE Reg reg_load_float16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
HT_INLINE Reg reg_load_bfloat16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
HT_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
HT_INLINE Reg reg_load_part(const float* p, int n, float rest) {
    return _mm512_mask_loadu_ps(reg_set(rest), first_lanes(n), p);
}
HT_INLINE void reg_store_part(float* p, int n, Reg a) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }
HT_INLINE void reg_store_float16(uint16_t* p, Reg a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// The upper halves of 32-bit words.
HT_INLINE void int_store_high(uint16_t* p, RegInt a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16)));
}

}  // namespace honeytrace::HONEYTRACE_LEVEL
