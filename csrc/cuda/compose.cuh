// compose: a * (1 - mask) + b * mask with a mask that broadcasts, bound by memory.
#pragma once

#include "cuda/rows.cuh"

namespace honeytrace::device {

constexpr int kComposed = 4;  // elements of a thread, a block apart, so that neighbours read neighbours

HT_DEVICE float load_float(const void* data, Type type, int64_t i) {
    if (type == Type::kFloat32) return static_cast<const float*>(data)[i];
    return float_of_half(type, static_cast<const uint16_t*>(data)[i]);
}

HT_DEVICE uint16_t half_of_float(Type type, float value) {
    // The conversions are for finite values, which stay finite between a and b.
    if (!is_finite_bits(bits_of(value))) {
        const uint16_t sign = static_cast<uint16_t>(bits_of(value) >> 16 & 0x8000u);
        const uint16_t quiet = value == value ? 0 : (type == Type::kFloat16 ? 0x0200 : 0x0040);
        return static_cast<uint16_t>(sign | (type == Type::kFloat16 ? 0x7C00 : 0x7F80) | quiet);
    }
    return type == Type::kFloat16 ? float16_from_float(value) : bfloat16_from_float(value);
}

HT_KERNEL(kThreads, 8)
compose_kernel(ComposeTask task) {
    const int64_t first = static_cast<int64_t>(block_x()) * kThreads * kComposed + thread_index();
    HT_UNROLL(4) for (int i = 0; i < kComposed; ++i) {
        const int64_t at = first + i * kThreads;
        if (at >= task.count) continue;
        int64_t where = at * task.outer_step;
        if (task.middle != 1 || task.inner != 1) {
            const int64_t z = at % task.inner, rest = at / task.inner;
            where = rest / task.middle * task.outer_step + rest % task.middle * task.middle_step + z * task.inner_step;
        }
        const float m = load_float(task.mask, task.mask_type, where);
        const float blended = load_float(task.a, task.type, at) * (1.0f - m) + load_float(task.b, task.type, at) * m;
        // Where the mask is 0 or 1 the sample's own bits are kept: 0 * NaN is NaN.
        const void* own = m == 0.0f ? task.a : (m == 1.0f ? task.b : nullptr);
        if (task.type == Type::kFloat32) {
            static_cast<float*>(task.out)[at] = own != nullptr ? static_cast<const float*>(own)[at] : blended;
        } else {
            static_cast<uint16_t*>(task.out)[at] =
                own != nullptr ? static_cast<const uint16_t*>(own)[at] : half_of_float(task.type, blended);
        }
    }
}

}  // namespace honeytrace::device
