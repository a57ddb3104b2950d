// AVX2 + FMA + F16C: two registers of 8 floats make the 16 lanes.
//
// | instruction       | used for                        | Zen 4: latency, per cycle | Skylake: latency, ports |
// |-------------------|---------------------------------|---------------------------|-------------------------|
// | vsubps ymm        | q - b                           | 3, 2 (add pipes)          | 4, p0 p1                |
// | vandps ymm        | absolute value                  | 1, 4                      | 1, p0 p1 p5             |
// | vaddps ymm        | |d| + sum                       | 3, 2 (add pipes)          | 4, p0 p1                |
// | vfmadd ymm        | d * d + sum, |d| * 1 + sum      | 4, 2 (multiply pipes)     | 4, p0 p1                |
// | vbroadcastss ymm  | one query feature to all rows   | load port                 | load port               |
// (figures as published by the makers and by uops.info)
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/hd.h"

namespace honeytrace::HONEYTRACE_LEVEL {

constexpr int kRegisterFloats = 8;
using Reg = __m256;
using RegMask = __m256;
using RegInt = __m256i;

#define HT_INLINE HONEYTRACE_HD
HT_INLINE Reg reg_load(const float* p) { return _mm256_loadu_ps(p); }
HT_INLINE void reg_store(float* p, Reg a) { _mm256_storeu_ps(p, a); }
HT_INLINE Reg reg_set(float x) { return _mm256_set1_ps(x); }
HT_INLINE Reg reg_add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
HT_INLINE Reg reg_sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
HT_INLINE Reg reg_sub_spread(Reg a, const float* b) { return reg_sub(a, reg_set(*b)); }
HT_INLINE Reg reg_mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
HT_INLINE Reg reg_div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
HT_INLINE Reg reg_fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
HT_INLINE Reg reg_min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
HT_INLINE Reg reg_max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
HT_INLINE Reg reg_abs(Reg a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
HT_INLINE Reg reg_sqrt(Reg a) { return _mm256_sqrt_ps(a); }
HT_INLINE Reg reg_round(Reg a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// |d| + sum. As |d| * 1 + sum it runs on the multiply pipes, which the subtraction leaves idle; same bits.
HT_INLINE Reg reg_add_abs(Reg d, Reg sum) { return _mm256_fmadd_ps(reg_abs(d), _mm256_set1_ps(1.0f), sum); }
HT_INLINE RegMask reg_less(Reg a, Reg b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
HT_INLINE Reg reg_select(RegMask m, Reg yes, Reg no) { return _mm256_blendv_ps(no, yes, m); }
HT_INLINE uint32_t reg_bits(RegMask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
HT_INLINE RegInt reg_as_int(Reg a) { return _mm256_castps_si256(a); }
HT_INLINE Reg int_as_reg(RegInt a) { return _mm256_castsi256_ps(a); }
HT_INLINE RegInt int_set(int32_t x) { return _mm256_set1_epi32(x); }
HT_INLINE RegInt int_add(RegInt a, RegInt b) { return _mm256_add_epi32(a, b); }
HT_INLINE RegInt int_sub(RegInt a, RegInt b) { return _mm256_sub_epi32(a, b); }
HT_INLINE RegInt int_and(RegInt a, RegInt b) { return _mm256_and_si256(a, b); }
template <int N>
HT_INLINE RegInt int_shift_left(RegInt a) {
    return _mm256_slli_epi32(a, N);
}
template <int N>
HT_INLINE RegInt int_shift_right(RegInt a) {
    return _mm256_srai_epi32(a, N);
}
HT_INLINE RegInt int_from(Reg a) { return _mm256_cvtps_epi32(a); }
HT_INLINE Reg reg_from(RegInt a) { return _mm256_cvtepi32_ps(a); }
HT_INLINE Reg reg_load_float16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
HT_INLINE Reg reg_load_bfloat16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
HT_INLINE __m256i first_lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
HT_INLINE Reg reg_load_part(const float* p, int n, float rest) {
    const __m256i mask = first_lanes(n);
    return _mm256_blendv_ps(reg_set(rest), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
}
HT_INLINE void reg_store_part(float* p, int n, Reg a) { _mm256_maskstore_ps(p, first_lanes(n), a); }
HT_INLINE void reg_store_float16(uint16_t* p, Reg a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// The upper halves of 32-bit words.
HT_INLINE void int_store_high(uint16_t* p, RegInt a) {
    const __m256i high = _mm256_srli_epi32(a, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

}  // namespace honeytrace::HONEYTRACE_LEVEL
