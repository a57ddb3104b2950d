// feature_distance for one block of queries and one group, and the same for those who need a distance only where it
// lies below a threshold.
//
// The tile: QT queries by NP panels of 16 rows, sums in registers. For every feature the NP panels are loaded, each
// query's feature is broadcast, and the metric's `accumulate` runs QT * NP times. A (query, row) pair is summed over
// the features in the bank's order, kFeatureBlock at a time, whatever the tile: which tile it falls into never shows
// in its bits. The blocks keep the rounding error of long sums down (block + number of blocks instead of D).
//
// Why a sum may stop early, with no margin for rounding: every term is at least 0 and rounding is monotone, so in
// float32 too a sum never falls when a term is added; what has been summed so far is a lower bound of the very number
// that the whole sum would have given. `finish` (for l1, l2 and cosine a division, a root, a product, each rounded
// correctly) and the mean of the k smallest are monotone as well, so lower bounds of the sums give a lower bound of
// the distance, bit for bit. Only lp's root is an approximation: kRootError.
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

// From the sums of one query to the distances of one panel.
template <class M>
HT_INLINE Lanes panel_distances(const M& metric, const DistanceTask& task, Lanes sum, size_t query_index,
                                size_t panel) {
    const OrderedQuery query{task.queries + query_index * task.query_stride, task.order};
    const float* rows = task.packed + panel * task.features * kLanes;
    Lanes distance = metric.finish(sum, static_cast<float>(task.features));
    if constexpr (M::kCosine) {
        if (!task.nonzero[query_index]) return fill(1.0f);
        const Lanes norm = load(task.norms + panel * kLanes);
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
HT_INLINE void offer_panel(const M& metric, const DistanceTask& task, Lanes sum, size_t query, size_t panel,
                           PanelLanes lanes) {
    const uint32_t beyond = task.every_row ? 0 : bits(less(fill(task.beyond[query]), sum));
    uint32_t candidates = lanes.rows & (~beyond | lanes.unusual);
    if (candidates == 0) return;
    SmallestK& smallest = task.smallest[query];
    const Lanes distance = panel_distances(metric, task, sum, query, panel);
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
    const uint32_t* queries;
    size_t count, begin, end;
};

// The rows' inverse norms; 0 for a norm that is too small, whose sums mean nothing.
HT_INLINE Lanes inverse_norms_of(const DistanceTask& task, size_t panel) {
    const Lanes norm = load(task.norms + panel * kLanes);
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
            inverse_norms[n] = inverse_norms_of(task, panel + n);
    }
    const float* rows = task.packed + panel * task.features * kLanes;
    if constexpr (M::kCosine && !kScales)
        rows = task.unit_panels + panel % panel_step(task.features) * task.features * kLanes;
    Lanes sums[QT * NP];
    for (int i = 0; i < QT * NP; ++i)
        sums[i] = pass.begin == 0 ? fill(0.0f) : load(partial_of(task, queries[i / NP]) + (panel + i % NP) * kLanes);
    tile_sums<QT, NP, kScales>(metric, packed_queries, rows, inverse_norms, task.features, pass.begin, pass.end, sums);
    for (int n = 0; n < NP; ++n) {
        const PanelLanes lanes = lanes_of<M>(task, panel + n);
        for (int q = 0; q < QT; ++q) {
            if (pass.end == task.features) {
                offer_panel(metric, task, sums[q * NP + n], queries[q], panel + n, lanes);
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
        const bool adjacent = queries[QT - 1] - queries[0] == QT - 1;
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
        const Lanes inverse = inverse_norms_of(task, panel);
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

// From the first feature, or from where their sums stand, to the distances of these queries.
template <class M>
void finish_queries(const M& metric, const DistanceTask& task, const Pass& pass) {
    for (size_t i = 0; i < pass.count; ++i) {
        const size_t query = pass.queries[i];
        task.smallest[query] = empty_set(task.keys + query * task.k, task.k);
        task.beyond[query] = __builtin_inff();
    }
    run_pass(metric, task, pass);
    for (size_t i = 0; i < pass.count; ++i) {
        const size_t query = pass.queries[i];
        SmallestK& smallest = task.smallest[query];
        int32_t* index = task.index ? task.index + query * task.index_stride : nullptr;
        float* distance = task.distance + query * task.distance_stride;
        if (!task.finite[query]) {
            *distance = __builtin_inff();
            for (size_t j = 0; index && j < task.k; ++j) index[j] = static_cast<int32_t>(j);
            continue;
        }
        sort_keys(smallest);
        *distance = mean_distance(smallest);
        for (size_t j = 0; index && j < task.k; ++j) index[j] = static_cast<int32_t>(row_of(smallest.keys[j]));
    }
}

// Where a pass over features may stop to look, after `begin`: at an eighth, a quarter and a half, at a place where
// tile_sums can go on.
HT_INLINE size_t next_look(size_t begin, size_t features) {
    for (size_t share = 8; share >= 2; share /= 2) {
        size_t look = features / share;
        look -= look % (look < kFeatureBlock ? 16 : kFeatureBlock);
        if (look > begin) return look;
    }
    return features;
}

enum class Outlook { kProven, kHopeful, kHopeless };

// A lower bound of the mean of the k smallest distances of one query, from the sums in task.partial.
template <class M>
float mean_bound(const M& metric, const DistanceTask& task, const float* partial, size_t query) {
    SmallestK smallest = empty_set(task.keys + query * task.k, task.k);
    for (size_t panel = 0; panel < panels_of(task.rows); ++panel) {
        const PanelLanes lanes = lanes_of<M>(task, panel);
        const Lanes sum = load(partial + panel * kLanes);
        uint32_t candidates = lanes.rows & (bits(less(sum, fill(bound_of(smallest)))) | lanes.unusual);
        if (!is_full(smallest)) candidates = lanes.rows;
        float values[kLanes];
        // A sum that small may be taken again on larger terms, and come out smaller by rounding.
        store(values, select(less(sum, fill(M::kSmallestSum)), fill(0.0f), sum));
        for (; candidates != 0; candidates &= candidates - 1) {
            const uint32_t lane = static_cast<uint32_t>(__builtin_ctz(candidates));
            offer(smallest, key_of((lanes.unusual >> lane) & 1u ? 0.0f : values[lane], lane));
        }
    }
    float mean = 0.0f;
    for (size_t first = 0; first < task.k; first += kLanes) {
        float values[kLanes] = {};
        const size_t count = task.k - first < kLanes ? task.k - first : kLanes;
        for (size_t i = 0; i < count; ++i) values[i] = distance_of(smallest.keys[first + i]);
        store(values, metric.finish(load(values), static_cast<float>(task.features)));
        for (size_t i = 0; i < count; ++i) mean += values[i];
    }
    return mean / static_cast<float>(task.k) * (1.0f - M::kRootError);
}

// What the sums of one query over `seen` features say: whether its distance is at least `enough`, and if not, whether
// more features may say so. A row whose sum is above `beyond` is at least `enough` away, and a little more: enough for
// a mean of such rows to be so after all its roundings.
template <class M>
Outlook outlook_of(const M& metric, const DistanceTask& task, size_t query, size_t seen, float enough, float beyond) {
    const float* partial = partial_of(task, query);
    const Lanes threshold = fill(beyond);
    size_t near_rows = 0;
    for (size_t panel = 0; panel < panels_of(task.rows); ++panel) {
        const PanelLanes lanes = lanes_of<M>(task, panel);
        const Lanes sum = load(partial + panel * kLanes);
        const uint32_t near = lanes.rows & (~bits(less(threshold, sum)) | lanes.unusual);
        if (near == 0) continue;
        near_rows += static_cast<size_t>(__builtin_popcount(near));
        // With k rows below the threshold their mean is below it, too.
        if (near_rows < task.k) continue;
        // Were the other features like those seen, would the rows of this panel end beyond the threshold?
        const float growth = static_cast<float>(task.features) / static_cast<float>(seen);
        const uint32_t still = bits(less(mul(sum, fill(growth)), threshold)) & near;
        return still == 0 ? Outlook::kHopeful : Outlook::kHopeless;
    }
    if (near_rows == 0 || mean_bound(metric, task, partial, query) >= enough) return Outlook::kProven;
    return Outlook::kHopeful;
}

template <class M>
void distance_with(const M& metric, const DistanceTask& task) {
    for (size_t i = 0; i < task.batch; ++i) task.lists[i] = static_cast<uint32_t>(i);
    finish_queries(metric, task, {task.lists, task.batch, 0, task.features});
}

// Queries that go on to another look, and those that go on to the last feature at once.
struct Split {
    uint32_t *hopeful, *straight;
    size_t hopes, straights;
};

// Looks at the sums of the hopeful queries and drops those that are proven. Where the others part ways they do so in
// numbers that fill tiles: a handful of queries is dear to compute alone.
template <class M>
Split split_queries(const M& metric, const DistanceTask& task, Split split, size_t seen, float slack) {
    const size_t asked = split.hopes;
    split.hopes = split.straights = 0;
    for (size_t i = 0; i < asked; ++i) {
        const uint32_t query = split.hopeful[i];
        const float beyond = sum_beyond(metric, task.enough[query] * slack, task.features);
        const Outlook outlook = outlook_of(metric, task, query, seen, task.enough[query], beyond);
        if (outlook == Outlook::kProven) continue;
        (outlook == Outlook::kHopeful ? split.hopes : split.straights) += 1;
        // Both kinds in one list, in order; the kind in the uppermost bit.
        split.straight[split.hopes + split.straights - 1] = query | (outlook == Outlook::kHopeful ? 1u << 31 : 0u);
    }
    const size_t left = split.hopes + split.straights, full_tiles = (split.hopes + kQueryFill / 2) / kQueryFill;
    const size_t filling = full_tiles * kQueryFill < left ? full_tiles * kQueryFill : left;
    const size_t hopes = split.straights == 0 ? left : filling;
    size_t spare = hopes > split.hopes ? hopes - split.hopes : 0;  // straight ones that may hope, too
    split.hopes = split.straights = 0;
    for (size_t i = 0; i < left; ++i) {
        const uint32_t query = split.straight[i] & ~(1u << 31);
        bool may_hope = query != split.straight[i];
        if (!may_hope && spare > 0) {
            --spare;
            may_hope = true;
        }
        may_hope = may_hope && split.hopes < hopes;
        (may_hope ? split.hopeful[split.hopes++] : split.straight[split.straights++]) = query;
    }
    return split;
}

// Distances where they are below task.enough, infinity where they are proven not to be. The queries that a look leaves
// in doubt go on from their sums; those for which more looks promise nothing go on to the end at once, so that data
// which defeat the bounds cost one look.
template <class M>
void bounded_with(const M& metric, const DistanceTask& task) {
    Split split{task.lists, task.lists + task.batch, 0, 0};
    const bool can_look = next_look(0, task.features) < task.features && task.k <= kLargestSortedK;
    // k numbers of at least enough * slack, added in float32 and divided by k, give at least `enough`: k roundings take
    // off less than a factor of 1 - k * 2^-24, and slack itself is rounded once.
    const float slack = 1.0f + static_cast<float>(task.k + 4) * 0x1p-22f;
    for (size_t i = 0; i < task.batch; ++i) {
        task.distance[i * task.distance_stride] = __builtin_inff();
        if (!(task.enough[i] > 0.0f)) {  // no distance is below 0
            ++task.counts->without_looking;
            continue;
        }
        const float beyond = sum_beyond(metric, task.enough[i] * slack, task.features);
        const bool hopes = can_look && beyond < __builtin_inff();
        (hopes ? split.hopeful[split.hopes++] : split.straight[split.straights++]) = static_cast<uint32_t>(i);
    }
    size_t finished = 0;
    const size_t asked = split.hopes + split.straights;
    for (size_t begin = 0;;) {
        if (split.straights != 0) finish_queries(metric, task, {split.straight, split.straights, begin, task.features});
        finished += split.straights;
        if (split.hopes == 0) break;
        const size_t end = next_look(begin, task.features);
        if (end == task.features) {
            finish_queries(metric, task, {split.hopeful, split.hopes, begin, end});
            finished += split.hopes;
            break;
        }
        run_pass(metric, task, {split.hopeful, split.hopes, begin, end});
        split = split_queries(metric, task, split, end, slack);
        begin = end;
    }
    task.counts->finished += finished;
    task.counts->by_bounds += asked - finished;
}

template <class M>
void distances_with(const M& metric, const DistanceTask& task) {
    task.enough == nullptr ? distance_with(metric, task) : bounded_with(metric, task);
}

template <class M>
M with_root(M metric, double p) {
    const double inverse = 1.0 / p;
    metric.inverse = static_cast<float>(inverse);
    metric.inverse_low = static_cast<float>(inverse - metric.inverse);
    metric.exponent = static_cast<float>(p);
    return metric;
}

inline void lp_distance(const DistanceTask& task) {
    // The rounded exponent is the exponent: its own inverse closes the sum.
    const double p = static_cast<float>(task.p);
    if (p == 1.0) return distances_with(L1{}, task);
    if (p == 2.0) return distances_with(L2{}, task);
    if (p == 1.5) return distances_with(with_root(LpThreeHalves{}, p), task);
    if (p == 3.0) return distances_with(with_root(L3{}, p), task);
    if (p == 4.0) return distances_with(with_root(L4{}, p), task);
    if (p <= 16.0 && 2.0 * p == static_cast<double>(static_cast<unsigned>(2.0 * p))) {
        LpHalves metric{};
        metric.twice = static_cast<unsigned>(2.0 * p);
        return distances_with(with_root(metric, p), task);
    }
    distances_with(with_root(LpAny{}, p), task);
}

inline void distance_kernel(const DistanceTask& task) {
    switch (task.metric) {
        case Metric::kL1: return distances_with(L1{}, task);
        case Metric::kL2: return distances_with(L2{}, task);
        case Metric::kCosine: return distances_with(Cosine{}, task);
        case Metric::kLp: return lp_distance(task);
    }
}

// The inner loop of a full tile on operands that never leave the first-level cache: what the machine could do.
template <class M>
uint64_t ceiling_of(const M& metric, uint64_t repeats) {
    constexpr size_t kFeatures = 64;
    constexpr int kPanels = kQueryTile >= 16 ? 1 : kPanelsOf4;
    alignas(64) float queries[kFeatures * kQueryTile], panels[kFeatures * kLanes * kPanels];
    for (float& value : queries) value = 1.0f;
    for (float& value : panels) value = 2.0f;
    Lanes sums[kQueryTile * kPanels];
    for (Lanes& sum : sums) sum = fill(0.0f);
    for (uint64_t i = 0; i < repeats; ++i) {
        tile_sums<kQueryTile, kPanels, false>(metric, queries, panels, nullptr, kFeatures, 0, kFeatures, sums);
        __asm__ volatile("" : : "r"(queries), "r"(panels), "r"(sums) : "memory");
    }
    return repeats * kFeatures * kLanes * kQueryTile * kPanels;
}

// For benches: l1, l2, lp with p = 3 and p = 1.5, cosine; returns the features of pairs that were compared.
inline uint64_t ceiling_kernel(Metric metric, double p, uint64_t repeats) {
    switch (metric) {
        case Metric::kL1: return ceiling_of(L1{}, repeats);
        case Metric::kL2: return ceiling_of(L2{}, repeats);
        case Metric::kCosine: return ceiling_of(Cosine{}, repeats);
        case Metric::kLp: return p == 1.5 ? ceiling_of(LpThreeHalves{}, repeats) : ceiling_of(L3{}, repeats);
    }
    return 0;
}

}  // namespace honeytrace::HONEYTRACE_LEVEL
