// float16 and bfloat16 as bit patterns: conversion to float32 (exact) and back (to nearest, ties to even,
// clamped to the largest finite value, because no answer may become infinite by rounding).
#pragma once

#include <cstdint>
#include <cstring>

#include "hd.h"

namespace honeytrace::HONEYTRACE_LEVEL {

constexpr float kLargestFloat32 = 3.402823466e+38f;
constexpr float kLargestFloat16 = 65504.0f;
constexpr float kLargestBfloat16 = 3.3895313892515355e+38f;

HONEYTRACE_HD uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

HONEYTRACE_HD float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

HONEYTRACE_HD bool is_finite_bits(uint32_t bits) { return (bits & 0x7F800000u) != 0x7F800000u; }

HONEYTRACE_HD float float_from_bfloat16(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

HONEYTRACE_HD float float_from_float16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7FFFu;
    if (magnitude >= 0x7C00u) return float_of(sign | 0x7F800000u | (magnitude << 13));  // infinity or NaN
    if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
    // Zero and subnormals: magnitude * 2^-24 is exact in float32.
    return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
}

HONEYTRACE_HD float clamp_finite(float value, float largest) {
    return value > largest ? largest : (value < -largest ? -largest : value);
}

// The value must not be NaN.
HONEYTRACE_HD uint16_t bfloat16_from_float(float value) {
    const uint32_t bits = bits_of(clamp_finite(value, kLargestBfloat16));
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// The value must not be NaN.
HONEYTRACE_HD uint16_t float16_from_float(float value) {
    const uint32_t bits = bits_of(clamp_finite(value, kLargestFloat16));
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude < 0x38800000u) {
        // Below 2^-14 the step of float16 is 2^-24, which is the step of a float32 in [0.5, 1): let the adder round.
        const uint32_t rounded = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
        return static_cast<uint16_t>(sign | rounded);
    }
    const uint32_t rounded = magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | (rounded >> 13));
}

}  // namespace honeytrace::HONEYTRACE_LEVEL
