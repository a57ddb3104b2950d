// feature_distance for one block of queries and one group, and the same for those who need a distance only where it
// lies below a threshold.
//
// Why a sum may stop early, with no margin for rounding: every term is at least 0 and rounding is monotone, so in
// float32 too a sum never falls when a term is added; what has been summed so far is a lower bound of the very number
// that the whole sum would have given. `finish` (for l1, l2 and cosine a division, a root, a product, each rounded
// correctly) and the mean of the k smallest are monotone as well, so lower bounds of the sums give a lower bound of
// the distance, bit for bit. Only lp's root is an approximation: kRootError.
#pragma once

#include "cpu/preselection.inl.h"
#include "cpu/tiles.inl.h"

namespace honeytrace::HONEYTRACE_LEVEL {

// The distance of a query whose k nearest rows are known.
inline void write_distance(const DistanceTask& task, size_t query) {
    SmallestK& smallest = task.smallest[query];
    int32_t* index = task.index ? task.index + query * task.index_stride : nullptr;
    float* distance = task.distance + query * task.distance_stride;
    if (!task.finite[query]) {
        *distance = __builtin_inff();
        for (size_t j = 0; index && j < task.k; ++j) index[j] = static_cast<int32_t>(j);
        return;
    }
    sort_keys(smallest);
    *distance = mean_distance(smallest);
    for (size_t j = 0; index && j < task.k; ++j) index[j] = static_cast<int32_t>(row_of(smallest.keys[j]));
}

// From the first feature, or from where their sums stand, to the distances of these queries. May reorder the list.
template <class M>
void finish_queries(const M& metric, const DistanceTask& task, Pass pass) {
    // Scores start from the first feature again: past the middle the rest of the sums is less work.
    if (pass.begin * 2 < pass.end) {
        const size_t left = preselect(metric, task, pass.queries, pass.count);
        for (size_t i = left; i < pass.count; ++i) write_distance(task, pass.queries[i]);
        pass.count = left;
    }
    for (size_t i = 0; i < pass.count; ++i) start_query(task, pass.queries[i]);
    run_pass(metric, task, pass);
    for (size_t i = 0; i < pass.count; ++i) write_distance(task, pass.queries[i]);
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

// The same of the scores; for the metrics that have them.
inline uint64_t score_ceiling_kernel(Metric metric, uint64_t repeats) {
    return metric == Metric::kL1 ? ceiling_of(Score<L1>{}, repeats) : ceiling_of(Score<L2>{}, repeats);
}

}  // namespace honeytrace::HONEYTRACE_LEVEL
