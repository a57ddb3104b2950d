// What the kernels of feature_distance share: the problem as they see it, and bounds that let them stop early.
//
// Order of a pair's sum, the same in every kernel: features by falling variance over the rows of the group, which lets
// sums pass a bound early; slices of 64 of them, each from its first to its last, and the slices from first to last. So
// which kernel, tile or part computes a pair never shows in its bits.
#pragma once

#include "cuda/select.h"
#include "cuda/tasks.h"

namespace honeytrace::device {

constexpr int kSlice = 64;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpLanes;

// Outside this range 1 / norm or norm^2 is not to be trusted in float32.
constexpr float kSmallestNorm = 0x1p-60f;
constexpr float kLargestNorm = 0x1p60f;

// State of a prepared query.
constexpr uint8_t kFinite = 1, kNonzero = 2;
// What a part of the bank says of a query: some of its rows are beyond the query's limit and were left out; sums were
// left off before their end, be it for that or because the rows cannot be among the k nearest.
constexpr uint8_t kLeftOut = 1, kStopped = 2;

struct DistanceProblem {
    const float* queries;  // [ceil(batch / 16)][features][16], unit vectors for cosine
    const uint8_t* state;  // [ceil(batch / 16) * 16]
    const float* packed;   // [groups][ceil(rows / 16)][features][16]
    const float* norms;    // [groups][ceil(rows / 16) * 16]
    const int32_t* order;  // [groups][features]: the features as sums take them, by falling variance over the rows
    uint64_t* keys;        // [batch][groups][parts][kept], ascending; kNoKey where a part had fewer
    uint64_t* above;       // [batch][groups]: the last key of the passes before
    uint8_t* skipped;      // [batch][groups][parts]: kLeftOut, kStopped
    uint8_t* exhaustive;   // [batch][groups]: merging had to go through the group again
    float* distance;       // [batch][groups]
    int32_t* index;        // [batch][groups][k], or null
    int batch, features, groups, rows;
    int k;                   // neighbours wanted
    int done, kept;          // of them found by the passes before, and wanted of this one
    int parts, part_panels;  // a part of the bank is this many panels
    FarRule far;

    HONEYTRACE_HD int panels() const { return (rows + kPanel - 1) / kPanel; }
    HONEYTRACE_HD const float* query_panel(int panel) const {
        return queries + static_cast<int64_t>(panel) * features * kPanel;
    }
    HONEYTRACE_HD const float* bank_panel(int group, int panel) const {
        return packed + (static_cast<int64_t>(group) * panels() + panel) * features * kPanel;
    }
    HONEYTRACE_HD const int32_t* group_order(int group) const { return order + static_cast<int64_t>(group) * features; }
    HONEYTRACE_HD const float* group_norms(int group) const {
        return norms + static_cast<int64_t>(group) * panels() * kPanel;
    }
    HONEYTRACE_HD int64_t flat(int query, int group) const { return static_cast<int64_t>(query) * groups + group; }
    HONEYTRACE_HD uint64_t* keys_of(int query, int group, int part) const {
        return keys + (flat(query, group) * parts + part) * kept;
    }
};

// Is the similarity of this distance 0? Never in plain feature_distance. Every step of similarity_of rounds
// monotonically, so what is true of a distance is true of all larger ones.
HONEYTRACE_HD bool is_far(const FarRule& far, int query, int group, float distance) {
    if (far.offset == nullptr) return false;
    const float confidence = far.confidence == nullptr ? 0.0f : far.confidence[query];
    if (confidence < 0.0f) return true;
    return similarity_of(distance, confidence, far.offset[group], far.scale[group], far.confidence_weight) == 0.0f;
}

// Distances from here on are far, with some room: a mean of k <= 32 such rounds by less. Infinity where none is.
HONEYTRACE_HD float limit_of(const FarRule& far, int query, int group) {
    if (far.offset == nullptr) return __builtin_inff();
    const float confidence = far.confidence == nullptr ? 0.0f : far.confidence[query];
    if (confidence < 0.0f) return 0.0f;
    const float offset = far.offset[group], spared = far.confidence_weight * confidence;
    const float limit = (offset - spared) + (fabsf(offset) + fabsf(spared)) * 0x1p-17f;
    return limit > 0.0f ? limit : 0.0f;
}

// Sums from here on belong to a larger distance, whatever was rounded. NaN, which no sum reaches, where float32 could
// not say so: within the range a sum is neither taken `again` for underflow nor, if it overflows, anywhere near.
template <class M>
HONEYTRACE_HD float sum_bound(const M& metric, float distance, int features) {
    // Every distance is at least 0, and of rows at equal distance the earlier one stays.
    if (distance == 0.0f) return 0.0f;
    const float sum = metric.unfinish(Scalar(distance), static_cast<float>(features)).value * M::kUnfinishMargin;
    return (sum > 0x1p-80f && sum < 0x1p100f) ? sum : __builtin_nanf("");
}

// 1 / norm of a bank row; 0 for a row of norm 0, whose distance is 1; NaN where the row must be looked at again.
HONEYTRACE_HD float inverse_norm(float norm) {
    if (norm == 0.0f) return 0.0f;
    return norm > kSmallestNorm && norm < kLargestNorm ? 1.0f / norm : __builtin_nanf("");
}

// Distances that a plain sum cannot give. A sum that is beyond float32, or so small that terms may have been lost,
// is taken again on differences divided by the largest of them (core/metrics.h says which).
template <class M>
HT_DEVICE float again(const M& metric, const float* query, const float* row, int features) {
    float largest = 0.0f;
    for (int d = 0; d < features; ++d) largest = fmaxf(largest, fabsf(row[d * kPanel] - query[d * kPanel]));
    if (!(largest > 0.0f)) return 0.0f;
    if (largest == __builtin_inff()) return largest;
    Scalar sum(0.0f);
    for (int d = 0; d < features; ++d) {
        const float difference = fabsf(row[d * kPanel] - query[d * kPanel]);
        sum = metric.accumulate(Scalar(difference / largest), Scalar(0.0f), sum);
    }
    return largest * metric.finish(sum, static_cast<float>(features)).value;
}

// A unit query and a row whose norm cannot be inverted: the row is divided by its largest value first.
HT_DEVICE float again(const Cosine&, const float* query, const float* row, int features) {
    float largest = 0.0f;
    for (int d = 0; d < features; ++d) largest = fmaxf(largest, fabsf(row[d * kPanel]));
    if (!(largest > 0.0f)) return 1.0f;
    float square = 0.0f;
    for (int d = 0; d < features; ++d) {
        const float value = row[d * kPanel] / largest;
        square = fmaf(value, value, square);
    }
    const float norm = sqrtf(square);
    float sum = 0.0f;
    for (int d = 0; d < features; ++d) {
        const float difference = row[d * kPanel] / largest / norm - query[d * kPanel];
        sum = fmaf(difference, difference, sum);
    }
    return 0.5f * sum;
}

constexpr float kAgain = -1.0f;  // in place of a distance: it must be taken `again`

// From a pair's sum to its distance; `inverse` is that of inverse_norm and counts for cosine only.
template <class M>
HT_DEVICE float distance_of_sum(const M& metric, float sum, float inverse, bool nonzero_query, int features) {
    if constexpr (M::kCosine) {
        if (!nonzero_query || inverse == 0.0f) return 1.0f;
        return sum == sum ? metric.finish(Scalar(sum), static_cast<float>(features)).value : kAgain;
    } else {
        if (!(sum >= M::kSmallestSum && sum < __builtin_inff())) return kAgain;
        return metric.finish(Scalar(sum), static_cast<float>(features)).value;
    }
}

// What the running sums of a query must reach before the rest of them can be left out, and why.
struct Exit {
    float sum;      // NaN: never
    bool by_limit;  // the rows left out are beyond the query's limit; otherwise they are beyond its k nearest
};

// best and worst: the first and the last of the query's kept keys so far.
template <class M>
HT_DEVICE Exit exit_of(const M& metric, const DistanceProblem& problem, int query, int group, uint64_t best,
                       uint64_t worst) {
    // Rows come in ascending order: one at the bound would lose the tie.
    float sum = worst == kNoKey ? __builtin_nanf("") : sum_bound(metric, distance_of(worst), problem.features);
    bool by_limit = false;
    const float limit = limit_of(problem.far, query, group);
    // A query with a near row wants its k nearest exactly.
    if (limit < __builtin_inff() && (best == kNoKey || !(distance_of(best) < limit))) {
        const float limit_sum = sum_bound(metric, limit, problem.features);
        if (limit_sum == limit_sum && !(sum <= limit_sum)) {
            sum = limit_sum;
            by_limit = true;
        }
    }
    return {sum, by_limit};
}

}  // namespace honeytrace::device
