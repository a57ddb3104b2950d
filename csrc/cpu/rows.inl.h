// Reading a block of rows as float32, normalising it for cosine, and hashing it.
#pragma once

#include "cpu/mixing.inl.h"
#include "cpu/vec.h"

namespace honeytrace::HONEYTRACE_LEVEL {

HT_INLINE float load_one(const void* row, DType dtype, size_t column) {
    if (dtype == DType::kFloat32) return static_cast<const float*>(row)[column];
    const uint16_t half = static_cast<const uint16_t*>(row)[column];
    return dtype == DType::kFloat16 ? float_from_float16(half) : float_from_bfloat16(half);
}

inline void load_rows_kernel(const LoadTask& task) {
    const RowSource& source = task.source;
    const size_t element = source.dtype == DType::kFloat32 ? 4 : 2;
    const Lanes infinity = fill(__builtin_inff());
    for (size_t i = 0; i < source.rows; ++i) {
        const void* row = static_cast<const char*>(source.data) + i * source.stride * element;
        float* out = task.out + i * task.out_stride;
        uint32_t finite = (1u << kLanes) - 1;
        size_t column = 0;
        for (; column + kLanes <= source.columns; column += kLanes) {
            const Lanes value = load_many(row, source.dtype, column);
            finite &= bits(less(absolute(value), infinity));
            store(out + column, value);
        }
        for (; column < source.columns; ++column) {
            out[column] = load_one(row, source.dtype, column);
            if (!is_finite_bits(bits_of(out[column]))) finite = 0;
        }
        task.finite[i] = finite == (1u << kLanes) - 1;
        if (!task.finite[i])
            for (column = 0; column < source.columns; ++column) out[column] = 0.0f;
    }
}

// Divides each query by its Euclidean norm; one of norm 0 stays as it is and gets nonzero = 0.
inline void normalise_rows_kernel(const DistanceTask& task) {
    for (size_t i = 0; i < task.batch; ++i) {
        float* row = task.queries + i * task.query_stride;
        const size_t whole = task.features - task.features % kLanes;
        const size_t rest = task.features - whole;
        Lanes largest = absolute(load_part(row + whole, rest, 0.0f));
        for (size_t d = 0; d < whole; d += kLanes) largest = maximum(largest, absolute(load(row + d)));
        const float scale = max_lanes(largest);
        task.nonzero[i] = scale > 0.0f;
        if (!task.nonzero[i]) continue;
        // Dividing by the largest first keeps the squares in range; by a division, for 1 / scale may be infinite.
        const Lanes divisor = fill(scale);
        const Lanes tail = divide(load_part(row + whole, rest, 0.0f), divisor);
        Lanes square = mul(tail, tail);
        for (size_t d = 0; d < whole; d += kLanes) {
            const Lanes value = divide(load(row + d), divisor);
            square = fma(value, value, square);
            store(row + d, value);
        }
        for (size_t d = whole; d < task.features; ++d) row[d] /= scale;
        const float inverse = 1.0f / __builtin_sqrtf(sum_lanes(square));
        for (size_t d = 0; d < whole; d += kLanes) store(row + d, mul(load(row + d), fill(inverse)));
        for (size_t d = whole; d < task.features; ++d) row[d] *= inverse;
    }
}

// In columns of 16 rows, so that what is written lies together.
inline void transpose_kernel(const TransposeTask& task) {
    for (size_t first = 0; first < task.rows; first += kLanes) {
        const size_t rows = task.rows - first < kLanes ? task.rows - first : kLanes;
        const float* in = task.in + first * task.row_stride;
        float* out = task.out + first;
        if (rows == kLanes) {
            for (size_t d = 0; d < task.columns; ++d, out += task.rows) {
                _Pragma("GCC unroll 16") for (size_t i = 0; i < kLanes; ++i) out[i] = in[i * task.row_stride + d];
            }
        } else {
            for (size_t d = 0; d < task.columns; ++d, out += task.rows)
                for (size_t i = 0; i < rows; ++i) out[i] = in[i * task.row_stride + d];
        }
    }
}

// Dot products of QT queries with PT planes, lanes along the features.
template <int QT, int PT>
HT_INLINE void sign_tile(const HashTask& task, size_t query, size_t plane) {
    const float* queries = task.queries + query * task.query_stride;
    const float* planes = task.planes + plane * task.features;
    const size_t whole = task.features - task.features % kLanes;
    Lanes sum[QT][PT];
    for (int q = 0; q < QT; ++q)
        for (int p = 0; p < PT; ++p) {
            const size_t rest = task.features - whole;
            sum[q][p] = mul(load_part(queries + q * task.query_stride + whole, rest, 0.0f),
                            load_part(planes + p * task.features + whole, rest, 0.0f));
        }
    for (size_t d = 0; d < whole; d += kLanes) {
        Lanes row[PT];
        _Pragma("GCC unroll 4") for (int p = 0; p < PT; ++p) row[p] = load(planes + p * task.features + d);
        _Pragma("GCC unroll 4") for (int q = 0; q < QT; ++q) {
            const Lanes value = load(queries + q * task.query_stride + d);
            _Pragma("GCC unroll 4") for (int p = 0; p < PT; ++p) sum[q][p] = fma(value, row[p], sum[q][p]);
        }
    }
    for (int q = 0; q < QT; ++q) {
        uint64_t word = 0;
        for (int p = 0; p < PT; ++p) word |= static_cast<uint64_t>(sum_lanes(sum[q][p]) >= 0.0f) << p;
        task.bucket[query + q] |= static_cast<int64_t>(word << plane);
    }
}

template <int QT>
HT_INLINE void sign_planes(const HashTask& task, size_t query) {
    size_t plane = 0;
    for (; plane + 2 <= task.n_planes; plane += 2) sign_tile<QT, 2>(task, query, plane);
    for (; plane < task.n_planes; ++plane) sign_tile<QT, 1>(task, query, plane);
}

inline void sign_hash_kernel(const HashTask& task) {
    for (size_t i = 0; i < task.batch; ++i) task.bucket[i] = 0;
    size_t query = 0;
    // With two planes and their rows the sums of so many queries fit the registers.
    constexpr int kQueries = kRegisters == 1 ? 4 : 2;
    for (; query + kQueries <= task.batch; query += kQueries) sign_planes<kQueries>(task, query);
    for (; query < task.batch; ++query) sign_planes<1>(task, query);
    for (size_t i = 0; i < task.batch; ++i)
        if (!task.finite[i]) task.bucket[i] = 0;
}

}  // namespace honeytrace::HONEYTRACE_LEVEL
