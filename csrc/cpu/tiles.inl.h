// The tiles that every distance is made of: sums of a block of queries and the panels of one group, and what becomes of
// the sums.
//
// The tile: QT queries by NP panels of 16 rows, sums in registers. For every feature the NP panels are loaded, each
// query's feature is broadcast, and the metric's `accumulate` runs QT * NP times. A (query, row) pair is summed over
// the features in the bank's order, kFeatureBlock at a time, whatever the tile: which tile it falls into never shows
// in its bits. The blocks keep the rounding error of long sums down (block + number of blocks instead of D).
#pragma once

#include <cstring>

#include "core/metrics.h"
#include "core/topk.h"
#include "cpu/layout.h"
#include "cpu/vec.h"

namespace honeytrace::HONEYTRACE_LEVEL {

constexpr size_t kFeatureBlock = 256;
// Outside this range 1 / norm or norm^2 is not to be trusted in float32.
constexpr float kSmallestNorm = 0x1p-60f;
constexpr float kLargestNorm = 0x1p60f;
constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

// Queries that fill the tiles of every level.
constexpr size_t kQueryFill = 16;

#define HT_UNROLL _Pragma("GCC unroll 16")

// Features [begin, end) of a tile. queries: [end - begin][QT]; panels: NP panels of [features][kLanes], one after the
// other; sums: [QT][NP], those of the features before `begin`, which lies in the first block or starts another one.
// inverse_norms: [NP], read where the tile scales the rows.
template <int QT, int NP, bool kScales, class M>
HT_INLINE void tile_sums(const M& metric, const float* queries, const float* panels, const Lanes* inverse_norms,
                         size_t features, size_t begin, size_t end, Lanes* sums) {
    const size_t panel_floats = features * kLanes;
    const float* query = queries;
    const float* panel = panels + begin * kLanes;
    while (begin < end) {
        const bool first = begin < kFeatureBlock;
        const size_t block_end = (begin / kFeatureBlock + 1) * kFeatureBlock, stop = end < block_end ? end : block_end;
        Lanes sum[QT][NP];
        HT_UNROLL for (int q = 0; q < QT; ++q) {
            HT_UNROLL for (int n = 0; n < NP; ++n)
                sum[q][n] = first ? sums[q * NP + n] : fill(0.0f);
        }
        for (; begin < stop; ++begin, query += QT, panel += kLanes) {
            Lanes row[NP];
            HT_UNROLL for (int n = 0; n < NP; ++n) {
                row[n] = load(panel + n * panel_floats);
                if constexpr (kScales) row[n] = mul(row[n], inverse_norms[n]);
            }
            HT_UNROLL for (int q = 0; q < QT; ++q) {
                HT_UNROLL for (int n = 0; n < NP; ++n)
                    sum[q][n] = metric.accumulate(Spread{query + q}, row[n], sum[q][n]);
            }
        }
        HT_UNROLL for (int q = 0; q < QT; ++q) {
            HT_UNROLL for (int n = 0; n < NP; ++n)
                sums[q * NP + n] = first ? sum[q][n] : add(sums[q * NP + n], sum[q][n]);
        }
    }
}

// Where the sums of a query are kept between passes.
HT_INLINE float* partial_of(const DistanceTask& task, size_t query) {
    return task.partial + query * partial_stride(task.rows);
}

// One query as the rare paths below read it: its features in the order of the panels.
struct OrderedQuery {
    const float* row;
    const int32_t* order;
    HT_INLINE float operator[](size_t d) const { return row[order[d]]; }
};

// Distances of one query to one panel where the plain sum has over- or underflowed: the differences are divided by
// the largest of them first, so that every term is in [0, 1] and one of them is 1.
template <class M>
__attribute__((noinline)) void rescaled_distances(const M& metric, OrderedQuery query, const float* panel,
                                                  size_t features, float* distances) {
    Lanes largest = fill(0.0f);
    for (size_t d = 0; d < features; ++d)
        largest = maximum(largest, absolute(sub(fill(query[d]), load(panel + d * kLanes))));
    const Lanes zero = fill(0.0f), infinity = fill(__builtin_inff());
    const LaneMask positive = less(zero, largest);
    const Lanes divisor = select(positive, largest, fill(1.0f));
    Lanes sum = zero;
    for (size_t d = 0; d < features; ++d) {
        const Lanes difference = absolute(sub(fill(query[d]), load(panel + d * kLanes)));
        sum = metric.accumulate(divide(difference, divisor), zero, sum);
    }
    const Lanes distance = mul(largest, metric.finish(sum, static_cast<float>(features)));
    // A difference that is itself beyond float32 makes infinity / infinity above.
    const Lanes bounded = select(less(largest, infinity), distance, infinity);
    store(distances, select(positive, bounded, zero));
}

// Cosine distances of one unit query to one panel with a row whose norm is too small or too large to be inverted.
inline __attribute__((noinline)) void rescaled_cosine(OrderedQuery query, const float* panel, size_t features,
                                                      float* distances) {
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
        sum = Cosine{}.accumulate(fill(query[d]), row, sum);
    }
    store(distances, select(positive, mul(sum, fill(0.5f)), fill(1.0f)));
}

// From the sums of one query to its distances from 16 rows, [features][kLanes] with their norms.
template <class M>
HT_INLINE Lanes panel_distances(const M& metric, const DistanceTask& task, Lanes sum, size_t query_index,
                                const float* rows, const float* norms) {
    const OrderedQuery query{task.queries + query_index * task.query_stride, task.order};
    Lanes distance = metric.finish(sum, static_cast<float>(task.features));
    if constexpr (M::kCosine) {
        if (!task.nonzero[query_index]) return fill(1.0f);
        const Lanes norm = load(norms);
        const LaneMask nonzero = less(fill(0.0f), norm);
        const LaneMask above = less(fill(kSmallestNorm), norm), below = less(norm, fill(kLargestNorm));
        if ((bits(nonzero) & ~(bits(above) & bits(below))) != 0) {
            float rescaled[kLanes];
            rescaled_cosine(query, rows, task.features, rescaled);
            distance = select(above, select(below, distance, load(rescaled)), load(rescaled));
        }
        distance = select(nonzero, distance, fill(1.0f));
    } else {
        const LaneMask too_small = less(sum, fill(M::kSmallestSum));
        const LaneMask in_range = less(sum, fill(__builtin_inff()));
        if (bits(too_small) != 0 || bits(in_range) != kAllLanes) {
            float rescaled[kLanes];
            rescaled_distances(metric, query, rows, task.features, rescaled);
            distance = select(too_small, load(rescaled), select(in_range, distance, load(rescaled)));
        }
    }
    return distance;
}

// A sum above which the distance is at least `distance`, or infinity if there is no saying. The factors leave room for
// the rounding of both directions. Within the range a sum is neither taken again for underflow nor, if it has
// overflowed, of a distance anywhere near.
template <class M>
HT_INLINE float sum_beyond(const M& metric, float distance, size_t features) {
    const Lanes sum = mul(metric.unfinish(fill(distance), static_cast<float>(features)), fill(M::kUnfinishMargin));
    float value[kLanes];
    store(value, sum);
    return value[0] > 0x1p-80f && value[0] < 0x1p100f ? value[0] : __builtin_inff();
}

// Before the first of its rows is offered.
HT_INLINE void start_query(const DistanceTask& task, size_t query) {
    task.smallest[query] = empty_set(task.keys + query * task.k, task.k);
    task.beyond[query] = __builtin_inff();
}

// What an epilogue knows of a panel, whatever the query: lanes that hold a row, and lanes whose sum means nothing.
struct PanelLanes {
    uint32_t rows, unusual;
};

template <class M>
HT_INLINE PanelLanes lanes_of(const DistanceTask& task, size_t panel) {
    const size_t left = task.rows - panel * kLanes;
    PanelLanes out{left < kLanes ? (1u << left) - 1 : kAllLanes, 0};
    if constexpr (M::kCosine) {
        const Lanes norm = load(task.norms + panel * kLanes);
        out.unusual = ~(bits(less(fill(kSmallestNorm), norm)) & bits(less(norm, fill(kLargestNorm)))) & out.rows;
    }
    return out;
}

// Offers the rows of a panel that may be among the k smallest. Most panels hold none: then one comparison of the sums
// is all, and neither a division nor a root is taken.
template <class M>
HT_INLINE void offer_sums(const M& metric, const DistanceTask& task, Lanes sum, size_t query, size_t panel) {
    const PanelLanes lanes = lanes_of<M>(task, panel);
    const uint32_t beyond = task.every_row ? 0 : bits(less(fill(task.beyond[query]), sum));
    uint32_t candidates = lanes.rows & (~beyond | lanes.unusual);
    if (candidates == 0) return;
    SmallestK& smallest = task.smallest[query];
    const Lanes distance = panel_distances(metric, task, sum, query, task.packed + panel * task.features * kLanes,
                                           task.norms + panel * kLanes);
    // Rows come in ascending order, so one at the bound would lose the tie.
    if (is_full(smallest) && !task.every_row) candidates &= bits(less(distance, fill(bound_of(smallest))));
    if (candidates == 0) return;
    float values[kLanes];
    store(values, distance);
    for (; candidates != 0; candidates &= candidates - 1) {
        const uint32_t lane = static_cast<uint32_t>(__builtin_ctz(candidates));
        offer(smallest, key_of(values[lane], static_cast<uint32_t>(panel * kLanes) + lane));
    }
    if (is_full(smallest)) task.beyond[query] = sum_beyond(metric, bound_of(smallest), task.features);
}

// Some queries of a block, and the features they take in this pass. Sums of a pass that does not reach the last feature
// are kept in task.partial and go on from there.
struct Pass {
    uint32_t* queries;
    size_t count, begin, end;
};

// The rows' inverse norms; 0 for a norm that is too small, whose sums mean nothing.
HT_INLINE Lanes inverse_norms_of(const float* norms) {
    const Lanes norm = load(norms);
    return select(less(fill(kSmallestNorm), norm), divide(fill(1.0f), norm), fill(0.0f));
}

template <int QT, int NP, class M>
__attribute__((noinline)) void tile(const M& metric, const DistanceTask& task, const Pass& pass,
                                    const uint32_t* queries, const float* packed_queries, size_t panel) {
    // Tiles of several queries read rows that are scaled already.
    constexpr bool kScales = M::kCosine && QT == 1;
    Lanes inverse_norms[NP] = {};
    if constexpr (kScales) {
        HT_UNROLL for (int n = 0; n < NP; ++n)
            inverse_norms[n] = inverse_norms_of(task.norms + (panel + n) * kLanes);
    }
    const float* rows = task.packed + panel * task.features * kLanes;
    if constexpr (M::kCosine && !kScales)
        rows = task.unit_panels + panel % panel_step(task.features) * task.features * kLanes;
    Lanes sums[QT * NP];
    for (int i = 0; i < QT * NP; ++i)
        sums[i] = pass.begin == 0 ? fill(0.0f) : load(partial_of(task, queries[i / NP]) + (panel + i % NP) * kLanes);
    tile_sums<QT, NP, kScales>(metric, packed_queries, rows, inverse_norms, task.features, pass.begin, pass.end, sums);
    for (int n = 0; n < NP; ++n) {
        for (int q = 0; q < QT; ++q) {
            if (pass.end == task.features) {
                offer_sums(metric, task, sums[q * NP + n], queries[q], panel + n);
            } else {
                store(partial_of(task, queries[q]) + (panel + n) * kLanes, sums[q * NP + n]);
            }
        }
    }
}

// Panels [panel, end): as many as fit NP at a time, the rest with smaller tiles.
template <int QT, int NP, class M>
HT_INLINE void tile_panels(const M& metric, const DistanceTask& task, const Pass& pass, const uint32_t* queries,
                           const float* packed_queries, size_t panel, size_t end) {
    for (; panel + NP <= end; panel += NP) tile<QT, NP>(metric, task, pass, queries, packed_queries, panel);
    if constexpr (NP > 1) tile_panels<QT, NP / 2>(metric, task, pass, queries, packed_queries, panel, end);
}

template <int QT, class M>
HT_INLINE void query_tiles(const M& metric, const DistanceTask& task, const Pass& pass, size_t* next, size_t panel,
                           size_t end) {
    // A tile of few queries takes more panels, to have enough independent sums in flight.
    constexpr int kPanels = QT >= 16 ? 1 : (QT >= 8 ? kPanelsOf8 : (QT >= 4 ? kPanelsOf4 : kPanelsOf1));
    for (; *next + QT <= pass.count; *next += QT)
        tile_panels<QT, kPanels>(metric, task, pass, pass.queries + *next, task.tiles + *next * (pass.end - pass.begin),
                                 panel, end);
}

// Queries of one tile side by side, features in the order of the panels: [features][QT].
template <int QT>
HT_INLINE void pack_queries(const DistanceTask& task, const Pass& pass, size_t* next) {
    for (; *next + QT <= pass.count; *next += QT) {
        const uint32_t* queries = pass.queries + *next;
        float* out = task.tiles + *next * (pass.end - pass.begin);
        // One by one: a list may be in any order.
        bool adjacent = true;
        for (int q = 1; q < QT; ++q) adjacent = adjacent && queries[q] == queries[0] + static_cast<uint32_t>(q);
        for (size_t d = pass.begin; d < pass.end; ++d, out += QT) {
            const float* feature = task.transposed + static_cast<size_t>(task.order[d]) * task.batch;
            if (adjacent) {
                memcpy(out, feature + queries[0], QT * sizeof(float));
            } else {
                HT_UNROLL for (int q = 0; q < QT; ++q)
                    out[q] = feature[queries[q]];
            }
        }
    }
}

// Panels [panel, end) with rows of norm 1, once for all tiles.
inline void unit_panels(const DistanceTask& task, const Pass& pass, size_t panel, size_t end) {
    float* out = task.unit_panels;
    for (; panel < end; ++panel, out += task.features * kLanes) {
        const float* rows = task.packed + panel * task.features * kLanes;
        const Lanes inverse = inverse_norms_of(task.norms + panel * kLanes);
        for (size_t d = pass.begin; d < pass.end; ++d) store(out + d * kLanes, mul(load(rows + d * kLanes), inverse));
    }
}

template <class M>
void run_pass(const M& metric, const DistanceTask& task, const Pass& pass) {
    size_t packed = 0;
    if constexpr (kQueryTile >= 16) pack_queries<16>(task, pass, &packed);
    if constexpr (kQueryTile >= 8) pack_queries<8>(task, pass, &packed);
    pack_queries<4>(task, pass, &packed);
    pack_queries<1>(task, pass, &packed);

    const size_t panels = panels_of(task.rows), step = panel_step(task.features);
    for (size_t panel = 0; panel < panels; panel += step) {
        const size_t end = panel + step < panels ? panel + step : panels;
        if constexpr (M::kCosine) {
            if (pass.count >= 4) unit_panels(task, pass, panel, end);
        }
        size_t next = 0;
        if constexpr (kQueryTile >= 16) query_tiles<16>(metric, task, pass, &next, panel, end);
        if constexpr (kQueryTile >= 8) query_tiles<8>(metric, task, pass, &next, panel, end);
        query_tiles<4>(metric, task, pass, &next, panel, end);
        query_tiles<1>(metric, task, pass, &next, panel, end);
    }
}

}  // namespace honeytrace::HONEYTRACE_LEVEL
