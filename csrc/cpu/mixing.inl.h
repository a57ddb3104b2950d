// What the logits of one row go through: their softmax's largest term and sum, and the bending towards a target.
//
// core/mixing.h holds the formulas of one class in double; here they run in float32 on 16 classes at a time. The
// logs of sums and weights come in double from outside and are rounded once.
#pragma once

#include <cstring>

#include "core/transcendental.h"
#include "cpu/vec.h"

namespace honeytrace::HONEYTRACE_LEVEL {

HT_INLINE Lanes load_many(const void* row, DType dtype, size_t column) {
    if (dtype == DType::kFloat32) return load(static_cast<const float*>(row) + column);
    const uint16_t* halves = static_cast<const uint16_t*>(row) + column;
    return dtype == DType::kFloat16 ? load_float16(halves) : load_bfloat16(halves);
}

// Columns [column, column + n) of a row, n < 16; the other lanes hold `rest`.
HT_INLINE Lanes load_tail(const void* row, DType dtype, size_t column, size_t n, float rest) {
    if (dtype == DType::kFloat32) return load_part(static_cast<const float*>(row) + column, n, rest);
    uint16_t halves[kLanes] = {};
    memcpy(halves, static_cast<const uint16_t*>(row) + column, n * sizeof(uint16_t));
    float wide[kLanes];
    store(wide, load_many(halves, dtype, 0));
    return load_part(wide, n, rest);
}

// float32 values within the dtype's finite range; n = 16 but for the last columns.
HT_INLINE void store_answer(void* row, DType dtype, size_t column, size_t n, Lanes value) {
    if (dtype == DType::kFloat32) {
        float* out = static_cast<float*>(row) + column;
        return n == kLanes ? store(out, value) : store_part(out, n, value);
    }
    uint16_t halves[kLanes];
    dtype == DType::kFloat16 ? store_float16(halves, value) : store_bfloat16(halves, value);
    if (n == kLanes) {
        memcpy(static_cast<uint16_t*>(row) + column, halves, sizeof halves);
    } else {
        memcpy(static_cast<uint16_t*>(row) + column, halves, n * sizeof(uint16_t));
    }
}

HT_INLINE float largest_of(DType dtype) {
    return dtype == DType::kFloat32 ? kLargestFloat32 : (dtype == DType::kFloat16 ? kLargestFloat16 : kLargestBfloat16);
}

// Runs body(column, n) over the columns, 16 at a time and the rest.
template <class Body>
HT_INLINE void for_columns(size_t columns, const Body& body) {
    size_t column = 0;
    for (; column + kLanes <= columns; column += kLanes) body(column, kLanes);
    if (column < columns) body(column, columns - column);
}

// Largest logit, and sum of exp(logit - largest): max softmax is 1 / sum.
inline Softmax softmax_kernel(const SoftmaxTask& task) {
    const Lanes infinity = fill(__builtin_inff());
    const size_t whole = task.columns - task.columns % kLanes, rest = task.columns - whole;
    Lanes largest = fill(-__builtin_inff());
    uint32_t finite = (1u << kLanes) - 1;
    for (size_t column = 0; column < whole; column += kLanes) {
        const Lanes value = load_many(task.row, task.dtype, column);
        finite &= bits(less(absolute(value), infinity));
        largest = maximum(value, largest);
        if (task.wide != nullptr) store(task.wide + column, value);
    }
    if (rest != 0) {
        finite &= bits(less(absolute(load_tail(task.row, task.dtype, whole, rest, 0.0f)), infinity));
        const Lanes value = load_tail(task.row, task.dtype, whole, rest, -__builtin_inff());
        largest = maximum(value, largest);
        if (task.wide != nullptr) store_part(task.wide + whole, rest, value);
    }
    Softmax out{finite == (1u << kLanes) - 1, 0.0f, 0.0f};
    if (!out.finite) return out;
    out.largest = max_lanes(largest);
    if (!task.with_sum) return out;
    const float* row = task.wide != nullptr ? task.wide : static_cast<const float*>(task.row);
    const Lanes top = fill(out.largest);
    Lanes sum = exp_negative(sub(load_part(row + whole, rest, -__builtin_inff()), top));
    for (size_t column = 0; column < whole; column += kLanes)
        sum = add(sum, exp_negative(sub(load(row + column), top)));
    out.sum = sum_lanes(sum);
    return out;
}

// Answers in logit space: (1 - w) z + w r.
HT_INLINE void bend_logits(const BendTask& task) {
    const Lanes limit = fill(largest_of(task.dtype)), lowest = fill(-largest_of(task.dtype));
    const Lanes take = fill(task.weight), keep = fill(1.0f - task.weight);
    for_columns(task.columns, [&](size_t column, size_t n) {
        const Lanes z = load_part(task.logits + column, n, 0.0f), r = load_part(task.target + column, n, 0.0f);
        const Lanes mixed = add(mul(keep, z), mul(take, r));
        store_answer(task.out, task.dtype, column, n, minimum(maximum(mixed, lowest), limit));
    });
}

// Answers in probability space: logaddexp(z + log(1 - w), log_softmax(r) + lse(z) + log(w)). The target's lse comes
// in two parts, or rounding it would cost as much as all the rest. The terms are kept finite from below: -infinity
// less itself is not a number.
HT_INLINE void bend_probabilities(const BendTask& task) {
    const Lanes limit = fill(largest_of(task.dtype)), lowest = fill(-largest_of(task.dtype));
    const Lanes floor = fill(-kLargestFloat32), log_keep = fill(task.log_keep), take = fill(task.take);
    const Lanes lse = fill(task.target_lse), lse_low = fill(task.target_lse_low);
    for_columns(task.columns, [&](size_t column, size_t n) {
        const Lanes z = load_part(task.logits + column, n, 0.0f), r = load_part(task.target + column, n, 0.0f);
        const Lanes kept = maximum(add(z, log_keep), floor);
        const Lanes taken = maximum(add(sub(sub(r, lse), lse_low), take), floor);
        const Lanes high = maximum(kept, taken), low = minimum(kept, taken);
        const Lanes mixed = add(high, log1p_unit(exp_negative(sub(low, high))));
        store_answer(task.out, task.dtype, column, n, minimum(maximum(mixed, lowest), limit));
    });
}

inline void bend_kernel(const BendTask& task) {
    if (task.logits == nullptr) {
        const Lanes limit = fill(largest_of(task.dtype)), lowest = fill(-largest_of(task.dtype));
        return for_columns(task.columns, [&](size_t column, size_t n) {
            const Lanes r = load_part(task.target + column, n, 0.0f);
            store_answer(task.out, task.dtype, column, n, minimum(maximum(r, lowest), limit));
        });
    }
    task.space == 0 ? bend_logits(task) : bend_probabilities(task);
}

}  // namespace honeytrace::HONEYTRACE_LEVEL
