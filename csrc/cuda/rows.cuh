// What is done once for each query, 16 queries a block: features as the distance kernels read them, the sign hash, and
// the confidence of the answer. Also reading and writing rows of any dtype, which mixing shares.
#pragma once

#include "cuda/problem.h"

namespace honeytrace::device {

constexpr int kRun = 8;  // elements that a thread reads at once

HT_DEVICE float float_of_half(Type type, uint16_t half) {
    return type == Type::kFloat16 ? float_from_float16(half) : float_from_bfloat16(half);
}

// Elements column .. column + 7 of a row as float32; `rest` beyond the last column.
HT_DEVICE void load_run(const RowsView& view, const char* row, int column, float rest, float (&out)[kRun]) {
    if (view.aligned && column + kRun <= view.columns) {
        if (view.type == Type::kFloat32) {
            const float* source = reinterpret_cast<const float*>(row) + column;
            const Float4 low = load4(source), high = load4(source + 4);
            out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
            out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
        } else {
            const Words4 words = load_words4(row + column * 2);
            HT_UNROLL(8) for (int i = 0; i < kRun; ++i)
                out[i] = float_of_half(view.type, static_cast<uint16_t>(words.word[i / 2] >> (i % 2 * 16)));
        }
        return;
    }
    HT_UNROLL(8) for (int i = 0; i < kRun; ++i) {
        out[i] = rest;
        if (column + i >= view.columns) continue;
        out[i] = view.type == Type::kFloat32
                     ? reinterpret_cast<const float*>(row)[column + i]
                     : float_of_half(view.type, reinterpret_cast<const uint16_t*>(row)[column + i]);
    }
}

HT_DEVICE bool all_finite(const float (&values)[kRun]) {
    bool finite = true;
    HT_UNROLL(8) for (int i = 0; i < kRun; ++i)
        finite = finite && is_finite_bits(bits_of(values[i]));
    return finite;
}

// Sum or largest over `lanes` neighbouring lanes, the same in all of them.
HT_DEVICE double sum_of_lanes(double value, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) value += shuffle(value, lane_index() ^ step);
    return value;
}
HT_DEVICE float sum_of_lanes(float value, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) value += shuffle(value, lane_index() ^ step);
    return value;
}
HT_DEVICE float largest_of_lanes(float value, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) value = fmaxf(value, shuffle(value, lane_index() ^ step));
    return value;
}

constexpr int kReaders = kThreads / kPanel;  // threads that share a query's features
constexpr int kStretch = kReaders * kRun;    // features that they read in one turn
static_assert(kStretch == kSlice);

struct PrepareMemory {
    float tile[kPanel][kStretch + 1];
};

// One panel of queries: float32, feature-major, unit vectors where `unit`; what is not finite becomes 0.
HT_DEVICE void prepare(const RowsTask& task, PrepareMemory& memory) {
    const int width = task.features.columns;
    const int of_panel = thread_index() / kReaders, reader = thread_index() % kReaders;
    const int query = block_x() * kPanel + of_panel;
    const bool there = query < task.features.rows;
    const char* row = task.features.row(there ? query : 0);
    bool finite = true;
    double square = 0.0;
    HT_UNROLL_BY(1)
    for (int d = reader * kRun; there && d < width; d += kStretch) {
        float x[kRun];
        load_run(task.features, row, d, 0.0f, x);
        finite = finite && all_finite(x);
        HT_UNROLL(8) for (int i = 0; i < kRun; ++i)
            square += static_cast<double>(x[i]) * x[i];
    }
    const uint32_t broken = ballot(!finite) >> (lane_index() / kReaders * kReaders) & ((1u << kReaders) - 1u);
    square = sum_of_lanes(square, kReaders);
    finite = broken == 0;
    const double norm = sqrt(square);
    if (reader == 0)
        task.state[query] =
            static_cast<uint8_t>((there && finite ? kFinite : 0) | (there && finite && square > 0.0 ? kNonzero : 0));
    // By a division: the inverse of a small norm may be beyond float32.
    const double divisor = task.unit && finite && square > 0.0 ? norm : 1.0;
    float* panel = task.queries + static_cast<int64_t>(block_x()) * width * kPanel;
    HT_UNROLL_BY(1)
    for (int base = 0; base < width; base += kStretch) {
        float x[kRun] = {};
        if (there) load_run(task.features, row, base + reader * kRun, 0.0f, x);
        HT_UNROLL(8) for (int i = 0; i < kRun; ++i) {
            float value = is_finite_bits(bits_of(x[i])) ? x[i] : 0.0f;
            if (task.unit) value = static_cast<float>(value / divisor);
            memory.tile[of_panel][reader * kRun + i] = value;
        }
        sync_block();
        for (int piece = thread_index(); piece < kStretch * kPanel / 4; piece += kThreads) {
            const int d = piece / (kPanel / 4), lane = piece % (kPanel / 4) * 4;
            if (base + d < width)
                store4(panel + static_cast<int64_t>(base + d) * kPanel + lane,
                       {memory.tile[lane][d], memory.tile[lane + 1][d], memory.tile[lane + 2][d],
                        memory.tile[lane + 3][d]});
        }
        sync_block();
    }
}

constexpr int kMostPlanes = 64;
constexpr int kHashStride = kStretch + 4;  // 16-byte loads of a warp's rows then fall on different banks
constexpr int kHashQueries = kPanel / kWarps;

struct HashMemory {
    float queries[kPanel][kHashStride];
    float planes[kMostPlanes][kHashStride];
    uint8_t broken[kPanel];
};

HT_DEVICE void load_hash_chunk(const RowsTask& task, HashMemory& memory, int base) {
    const int of_panel = thread_index() / kReaders, reader = thread_index() % kReaders;
    const int query = block_x() * kPanel + of_panel;
    float x[kRun] = {};
    if (query < task.features.rows) load_run(task.features, task.features.row(query), base + reader * kRun, 0.0f, x);
    if (!all_finite(x)) memory.broken[of_panel] = 1;  // several threads may say so; then the sums do not matter
    for (int i = 0; i < kRun; i += 4)
        store4(&memory.queries[of_panel][reader * kRun + i], {x[i], x[i + 1], x[i + 2], x[i + 3]});
    const RowsView planes{task.planes,           Type::kFloat32,        task.n_planes,
                          task.features.columns, task.features.columns, task.planes_aligned};
    HT_UNROLL_BY(1)
    for (int plane = of_panel; plane < kMostPlanes; plane += kPanel) {
        float y[kRun] = {};
        if (plane < task.n_planes) load_run(planes, planes.row(plane), base + reader * kRun, 0.0f, y);
        for (int i = 0; i < kRun; i += 4)
            store4(&memory.planes[plane][reader * kRun + i], {y[i], y[i + 1], y[i + 2], y[i + 3]});
    }
}

// Buckets of 16 queries: a warp has 4 of them, a lane the planes `lane` and `lane + 32`.
HT_DEVICE void hash(const RowsTask& task, HashMemory& memory) {
    const int lane = lane_index(), first = warp_index() * kHashQueries;
    if (thread_index() < kPanel) memory.broken[thread_index()] = 0;
    float total[kHashQueries][2] = {};
    HT_UNROLL_BY(1)
    for (int base = 0; base < task.features.columns; base += kStretch) {
        sync_block();
        load_hash_chunk(task, memory, base);
        sync_block();
        float part[kHashQueries][2] = {};
        HT_UNROLL_BY(2)
        for (int d = 0; d < kStretch; d += 4) {
            const Float4 low = load4(&memory.planes[lane][d]), high = load4(&memory.planes[lane + kWarpLanes][d]);
            HT_UNROLL(4) for (int q = 0; q < kHashQueries; ++q) {
                const Float4 x = load4(&memory.queries[first + q][d]);
                float a = part[q][0], b = part[q][1];
                a = fmaf(x.x, low.x, a), a = fmaf(x.y, low.y, a), a = fmaf(x.z, low.z, a), a = fmaf(x.w, low.w, a);
                b = fmaf(x.x, high.x, b), b = fmaf(x.y, high.y, b), b = fmaf(x.z, high.z, b), b = fmaf(x.w, high.w, b);
                part[q][0] = a, part[q][1] = b;
            }
        }
        HT_UNROLL(4) for (int q = 0; q < kHashQueries; ++q)
            total[q][0] += part[q][0], total[q][1] += part[q][1];
    }
    HT_UNROLL(4) for (int q = 0; q < kHashQueries; ++q) {
        const uint32_t low = ballot(lane < task.n_planes && total[q][0] >= 0.0f);
        const uint32_t high = ballot(lane + kWarpLanes < task.n_planes && total[q][1] >= 0.0f);
        const int query = block_x() * kPanel + first + q;
        if (lane == 0 && query < task.features.rows) {
            const uint64_t word = static_cast<uint64_t>(high) << 32 | low;
            task.bucket[query] = memory.broken[first + q] ? 0 : static_cast<int64_t>(word);
        }
    }
}

// Max softmax of each answer, -1 where a logit is not finite; a warp for an answer.
HT_DEVICE void confidence(const RowsTask& task) {
    const int end = min_of((block_x() + 1) * kPanel, task.logits.rows);
    HT_UNROLL_BY(1)
    for (int query = block_x() * kPanel + warp_index(); query < end; query += kWarps) {
        const char* row = task.logits.row(query);
        bool finite = true;
        float top = -__builtin_inff();
        for (int c = lane_index() * kRun; c < task.logits.columns; c += kWarpLanes * kRun) {
            float z[kRun];
            load_run(task.logits, row, c, -kLargestFloat32, z);
            finite = finite && all_finite(z);
            for (int i = 0; i < kRun; ++i) top = fmaxf(top, z[i]);
        }
        top = largest_of_lanes(top, kWarpLanes);
        float sum = 0.0f;
        for (int c = lane_index() * kRun; c < task.logits.columns; c += kWarpLanes * kRun) {
            float z[kRun];
            load_run(task.logits, row, c, -__builtin_inff(), z);
            for (int i = 0; i < kRun; ++i) sum += exp_negative(Scalar(z[i] - top)).value;
        }
        sum = sum_of_lanes(sum, kWarpLanes);
        const bool broken = ballot(!finite) != 0;
        if (lane_index() == 0) task.confidence[query] = broken ? -1.0f : 1.0f / sum;
    }
}

// Grid: panels of queries, roles: what `first_role` + y says.
enum class Role : int { kPrepare = 0, kHash = 1, kConfidence = 2 };

HT_KERNEL(kThreads, 4)
rows_kernel(RowsTask task, int first_role) {
    const Role role = static_cast<Role>(first_role + block_y());
    if (role == Role::kPrepare) prepare(task, *reinterpret_cast<PrepareMemory*>(shared_memory()));
    if (role == Role::kHash) hash(task, *reinterpret_cast<HashMemory*>(shared_memory()));
    if (role == Role::kConfidence) confidence(task);
}

}  // namespace honeytrace::device
