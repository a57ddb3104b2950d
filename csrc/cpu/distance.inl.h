// feature_distance for one block of queries and one group.
//
// The tile: QT queries by NP panels of 16 rows, sums in registers. For every feature the NP panels are loaded, each
// query's feature is broadcast, and the metric's `accumulate` runs QT * NP times. A (query, row) pair is summed over
// the features in order, kFeatureBlock at a time, whatever the tile: which tile it falls into never shows in its
// bits. The blocks keep the rounding error of long sums down (block + number of blocks instead of D).
#pragma once

#include "core/metrics.h"
#include "core/topk.h"
#include "cpu/vec.h"

namespace honeytrace::HONEYTRACE_LEVEL {

constexpr size_t kFeatureBlock = 256;
// Panels that stay in the second-level cache while all queries of the block pass over them.
constexpr size_t kPanelBytes = 256 * 1024;
// Outside this range 1 / norm or norm^2 is not to be trusted in float32.
constexpr float kSmallestNorm = 0x1p-60f;
constexpr float kLargestNorm = 0x1p60f;

#define HT_UNROLL _Pragma("GCC unroll 16")

// queries: [features][QT]; panels: NP panels of [features][kLanes], one after the other; sums: [QT][NP].
// inverse_norms: [NP], read for cosine only.
template <int QT, int NP, class M>
HT_INLINE void tile_sums(const M& metric, const float* queries, const float* panels, const Lanes* inverse_norms,
                         size_t features, Lanes* sums) {
    const size_t panel_floats = features * kLanes;
    HT_UNROLL for (int i = 0; i < QT * NP; ++i)
        sums[i] = fill(0.0f);
    for (size_t begin = 0; begin < features; begin += kFeatureBlock) {
        const size_t end = begin + kFeatureBlock < features ? begin + kFeatureBlock : features;
        Lanes sum[QT][NP];
        HT_UNROLL for (int q = 0; q < QT; ++q) {
            HT_UNROLL for (int n = 0; n < NP; ++n)
                sum[q][n] = fill(0.0f);
        }
        const float* query = queries + begin * QT;
        const float* panel = panels + begin * kLanes;
        for (size_t d = begin; d < end; ++d, query += QT, panel += kLanes) {
            Lanes row[NP];
            HT_UNROLL for (int n = 0; n < NP; ++n) {
                row[n] = load(panel + n * panel_floats);
                if constexpr (M::kCosine) row[n] = mul(row[n], inverse_norms[n]);
            }
            HT_UNROLL for (int q = 0; q < QT; ++q) {
                HT_UNROLL for (int n = 0; n < NP; ++n)
                    sum[q][n] = metric.accumulate(Spread{query + q}, row[n], sum[q][n]);
            }
        }
        HT_UNROLL for (int q = 0; q < QT; ++q) {
            HT_UNROLL for (int n = 0; n < NP; ++n)
                sums[q * NP + n] = add(sums[q * NP + n], sum[q][n]);
        }
    }
}

// Distances of one query to one panel where the plain sum has over- or underflowed: the differences are divided by
// the largest of them first, so that every term is in [0, 1] and one of them is 1.
template <class M>
__attribute__((noinline)) void rescaled_distances(const M& metric, const float* query, size_t query_step,
                                                  const float* panel, size_t features, float* distances) {
    Lanes largest = fill(0.0f);
    for (size_t d = 0; d < features; ++d)
        largest = maximum(largest, absolute(sub(fill(query[d * query_step]), load(panel + d * kLanes))));
    const Lanes zero = fill(0.0f), infinity = fill(__builtin_inff());
    const LaneMask positive = less(zero, largest);
    const Lanes divisor = select(positive, largest, fill(1.0f));
    Lanes sum = zero;
    for (size_t d = 0; d < features; ++d) {
        const Lanes difference = absolute(sub(fill(query[d * query_step]), load(panel + d * kLanes)));
        sum = metric.accumulate(divide(difference, divisor), zero, sum);
    }
    const Lanes distance = mul(largest, metric.finish(sum, static_cast<float>(features)));
    // A difference that is itself beyond float32 makes infinity / infinity above.
    const Lanes bounded = select(less(largest, infinity), distance, infinity);
    store(distances, select(positive, bounded, zero));
}

// Cosine distances of one unit query to one panel with a row whose norm is too small or too large to be inverted.
inline __attribute__((noinline)) void rescaled_cosine(const float* query, size_t query_step, const float* panel,
                                                      size_t features, float* distances) {
    Lanes largest = fill(0.0f);
    for (size_t d = 0; d < features; ++d) largest = maximum(largest, absolute(load(panel + d * kLanes)));
    const LaneMask positive = less(fill(0.0f), largest);
    const Lanes divisor = select(positive, largest, fill(1.0f));
    Lanes square = fill(0.0f);
    for (size_t d = 0; d < features; ++d) {
        const Lanes row = divide(load(panel + d * kLanes), divisor);
        square = fma(row, row, square);
    }
    const Lanes norm = square_root(square);
    Lanes sum = fill(0.0f);
    for (size_t d = 0; d < features; ++d) {
        const Lanes row = divide(divide(load(panel + d * kLanes), divisor), norm);
        sum = Cosine{}.accumulate(fill(query[d * query_step]), row, sum);
    }
    store(distances, select(positive, mul(sum, fill(0.5f)), fill(1.0f)));
}

// From the sums of one query to the distances of one panel.
template <class M>
HT_INLINE Lanes panel_distances(const M& metric, const DistanceTask& task, Lanes sum, const float* query,
                                size_t query_step, size_t panel, bool zero_query) {
    const float* rows = task.packed + panel * task.features * kLanes;
    Lanes distance = metric.finish(sum, static_cast<float>(task.features));
    if constexpr (M::kCosine) {
        if (zero_query) return fill(1.0f);
        const Lanes norm = load(task.norms + panel * kLanes);
        const LaneMask nonzero = less(fill(0.0f), norm);
        const LaneMask above = less(fill(kSmallestNorm), norm), below = less(norm, fill(kLargestNorm));
        if ((bits(nonzero) & ~(bits(above) & bits(below))) != 0) {
            float rescaled[kLanes];
            rescaled_cosine(query, query_step, rows, task.features, rescaled);
            distance = select(above, select(below, distance, load(rescaled)), load(rescaled));
        }
        distance = select(nonzero, distance, fill(1.0f));
    } else {
        const LaneMask too_small = less(sum, fill(M::kSmallestSum));
        const LaneMask in_range = less(sum, fill(__builtin_inff()));
        if (bits(too_small) != 0 || bits(in_range) != (1u << kLanes) - 1) {
            float rescaled[kLanes];
            rescaled_distances(metric, query, query_step, rows, task.features, rescaled);
            distance = select(too_small, load(rescaled), select(in_range, distance, load(rescaled)));
        }
    }
    return distance;
}

HT_INLINE void offer_panel(SmallestK& smallest, Lanes distance, size_t first_row, size_t rows) {
    const size_t lanes = rows - first_row < kLanes ? rows - first_row : kLanes;
    uint32_t candidates = (1u << lanes) - 1;
    // Rows come in ascending order, so one at the bound would lose the tie.
    if (is_full(smallest)) candidates &= bits(less(distance, fill(bound_of(smallest))));
    if (candidates == 0) return;
    float values[kLanes];
    store(values, distance);
    for (; candidates != 0; candidates &= candidates - 1) {
        const uint32_t lane = static_cast<uint32_t>(__builtin_ctz(candidates));
        offer(smallest, key_of(values[lane], static_cast<uint32_t>(first_row) + lane));
    }
}

template <int QT, int NP, class M>
__attribute__((noinline)) void tile(const M& metric, const DistanceTask& task, const float* queries, size_t first_query,
                                    size_t panel, SmallestK* smallest) {
    Lanes inverse_norms[NP] = {};
    if constexpr (M::kCosine) {
        HT_UNROLL for (int n = 0; n < NP; ++n) {
            const Lanes norm = load(task.norms + (panel + n) * kLanes);
            const LaneMask ordinary = less(fill(kSmallestNorm), norm);
            inverse_norms[n] = select(ordinary, divide(fill(1.0f), norm), fill(0.0f));
        }
    }
    Lanes sums[QT * NP];
    tile_sums<QT, NP>(metric, queries, task.packed + panel * task.features * kLanes, inverse_norms, task.features,
                      sums);
    for (int q = 0; q < QT; ++q) {
        const size_t query = first_query + q;
        for (int n = 0; n < NP; ++n) {
            const Lanes distance = panel_distances(metric, task, sums[q * NP + n], queries + q, QT, panel + n,
                                                   M::kCosine && !task.nonzero[query]);
            offer_panel(smallest[query], distance, (panel + n) * kLanes, task.rows);
        }
    }
}

// Panels [panel, end): as many as fit NP at a time, the rest with smaller tiles.
template <int QT, int NP, class M>
HT_INLINE void tile_panels(const M& metric, const DistanceTask& task, const float* queries, size_t first_query,
                           size_t panel, size_t end, SmallestK* smallest) {
    for (; panel + NP <= end; panel += NP) tile<QT, NP>(metric, task, queries, first_query, panel, smallest);
    if constexpr (NP > 1) tile_panels<QT, NP / 2>(metric, task, queries, first_query, panel, end, smallest);
}

template <int QT, class M>
HT_INLINE void query_tiles(const M& metric, const DistanceTask& task, size_t* query, size_t panel, size_t end,
                           SmallestK* smallest) {
    // A tile of few queries takes more panels, to have enough independent sums in flight.
    constexpr int kPanels = QT >= 16 ? 1 : (QT >= 8 ? kPanelsOf8 : (QT >= 4 ? kPanelsOf4 : kPanelsOf1));
    for (; *query + QT <= task.batch; *query += QT)
        tile_panels<QT, kPanels>(metric, task, task.tiles + *query * task.features, *query, panel, end, smallest);
}

// Queries of one tile side by side, features in order: [features][QT].
template <int QT>
HT_INLINE void pack_queries(const DistanceTask& task, size_t* query) {
    for (; *query + QT <= task.batch; *query += QT) {
        const float* rows = task.queries + *query * task.query_stride;
        float* out = task.tiles + *query * task.features;
        for (size_t d = 0; d < task.features; ++d, out += QT) {
            HT_UNROLL for (int q = 0; q < QT; ++q)
                out[q] = rows[q * task.query_stride + d];
        }
    }
}

template <class M>
void distance_with(const M& metric, const DistanceTask& task) {
    size_t packed_queries = 0;
    if constexpr (kQueryTile >= 16) pack_queries<16>(task, &packed_queries);
    if constexpr (kQueryTile >= 8) pack_queries<8>(task, &packed_queries);
    pack_queries<4>(task, &packed_queries);
    pack_queries<1>(task, &packed_queries);

    SmallestK* smallest = task.smallest;
    for (size_t i = 0; i < task.batch; ++i) smallest[i] = empty_set(task.keys + i * task.k, task.k);

    const size_t panels = (task.rows + kLanes - 1) / kLanes;
    const size_t panel_bytes = task.features * kLanes * sizeof(float);
    const size_t fitting = kPanelBytes / panel_bytes;
    const size_t step = fitting < 8 ? 8 : fitting - fitting % 8;
    for (size_t panel = 0; panel < panels; panel += step) {
        const size_t end = panel + step < panels ? panel + step : panels;
        size_t query = 0;
        if constexpr (kQueryTile >= 16) query_tiles<16>(metric, task, &query, panel, end, smallest);
        if constexpr (kQueryTile >= 8) query_tiles<8>(metric, task, &query, panel, end, smallest);
        query_tiles<4>(metric, task, &query, panel, end, smallest);
        query_tiles<1>(metric, task, &query, panel, end, smallest);
    }

    for (size_t i = 0; i < task.batch; ++i) {
        int32_t* index = task.index ? task.index + i * task.index_stride : nullptr;
        float* distance = task.distance + i * task.distance_stride;
        if (!task.finite[i]) {
            *distance = __builtin_inff();
            for (size_t j = 0; index && j < task.k; ++j) index[j] = static_cast<int32_t>(j);
            continue;
        }
        sort_keys(smallest[i]);
        *distance = mean_distance(smallest[i]);
        for (size_t j = 0; index && j < task.k; ++j) index[j] = static_cast<int32_t>(row_of(smallest[i].keys[j]));
    }
}

template <class M>
M with_root(M metric, double p) {
    const double inverse = 1.0 / p;
    metric.inverse = static_cast<float>(inverse);
    metric.inverse_low = static_cast<float>(inverse - metric.inverse);
    return metric;
}

inline void lp_distance(const DistanceTask& task) {
    // The rounded exponent is the exponent: its own inverse closes the sum.
    const double p = static_cast<float>(task.p);
    if (p == 1.0) return distance_with(L1{}, task);
    if (p == 2.0) return distance_with(L2{}, task);
    if (p == 1.5) return distance_with(with_root(LpThreeHalves{}, p), task);
    if (p == 3.0) return distance_with(with_root(L3{}, p), task);
    if (p == 4.0) return distance_with(with_root(L4{}, p), task);
    if (p <= 16.0 && 2.0 * p == static_cast<double>(static_cast<unsigned>(2.0 * p))) {
        LpHalves metric{};
        metric.twice = static_cast<unsigned>(2.0 * p);
        return distance_with(with_root(metric, p), task);
    }
    LpAny metric{};
    metric.exponent = static_cast<float>(p);
    distance_with(with_root(metric, p), task);
}

inline void distance_kernel(const DistanceTask& task) {
    switch (task.metric) {
        case Metric::kL1: return distance_with(L1{}, task);
        case Metric::kL2: return distance_with(L2{}, task);
        case Metric::kCosine: return distance_with(Cosine{}, task);
        case Metric::kLp: return lp_distance(task);
    }
}

}  // namespace honeytrace::HONEYTRACE_LEVEL
