// The operations on plain pointers: they split the batch into blocks, run the kernels of the level in use on each
// and know nothing of Python. Arguments are taken as valid; bindings.cpp checks what can be checked there.
//
// A result never depends on the split: a block's queries are computed as each would be alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/mixing.h"
#include "cpu/kernels.h"

namespace honeytrace {

using baseline::MixingRule;

// Trigger banks as pack_bank leaves them.
struct Bank {
    const float* packed;  // the parts below, one after the other, each for all groups
    const float* norms;   // [groups][panels * kLanes]
    size_t groups, rows, features;

    size_t panels() const { return (rows + kLanes - 1) / kLanes; }
    size_t lanes() const { return panels() * kLanes; }
    // [panels][features][kLanes]
    const float* packed_of(size_t group) const { return packed + group * lanes() * features; }
    // [features]: the feature that lies at each place of the panels.
    const int32_t* order_of(size_t group) const {
        return reinterpret_cast<const int32_t*>(packed_of(groups)) + group * features;
    }
    // [panels * kLanes][features]: the rows once more, one after the other, features in that order.
    const float* by_row_of(size_t group) const {
        return packed_of(groups) + groups * features + group * lanes() * features;
    }
    // [panels * kLanes] each: half of a row's sum, and of its squared norm.
    const float* half_sums_of(size_t group) const { return by_row_of(groups) + group * lanes(); }
    const float* half_squares_of(size_t group) const { return half_sums_of(groups) + group * lanes(); }
    const float* norms_of(size_t group) const { return norms + group * lanes(); }
    // The length of `packed`.
    size_t packed_floats() const { return groups * (features + 2 * lanes() * (features + 1)); }
};

struct Neighbours {
    size_t k;
    Metric metric;
    double p;
};

// rows: float32 [groups][rows][features], finite. Lanes beyond the last row become 0, with norm 0.
void pack_bank(const float* rows, size_t groups, size_t rows_of_group, size_t features, float* packed, float* norms);

// distance: [features.rows][groups]; index: [features.rows][groups][k] or null.
void feature_distance(const RowSource& features, const Bank& bank, const Neighbours& neighbours, float* distance,
                      int32_t* index, size_t threads);

void sign_hash(const RowSource& features, const float* planes, size_t n_planes, int64_t* bucket, size_t threads);

// What mixing reads beside the logits, and where it writes. Row i of `similarity` has `groups` values.
struct Mixing {
    const float* target_logits;  // [groups][classes]
    size_t groups;
    MixingRule rule;
    uint64_t seed;
    void* out;  // [rows][classes], dtype of the logits
    int64_t* group;
    bool* flipped;
};

void watermark_mix(const RowSource& logits, const float* similarity, const int64_t* bucket, const Mixing& mixing,
                   size_t threads);

// From distance to similarity.
struct SimilarityRule {
    const float* offset;  // [groups]
    const float* scale;   // [groups]
    float confidence_weight;
};

// kEven: the same work for a query whose answer is bent and for one whose answer is not, so that the time of a call
// does not tell them apart: every distance in full, every row hashed, bent and flipped, and one of the three answers
// copied out. The results are the same, bit for bit. What still depends on the data: the rare paths of sums that have
// over- or underflowed (a query equal to a bank row is one), the heap of k > 256, and logits that are not finite.
enum class Effort { kLeast, kEven };

void watermark(const RowSource& features, const RowSource& logits, const Bank& bank, const Neighbours& neighbours,
               const float* planes, size_t n_planes, const SimilarityRule& rule, const Mixing& mixing,
               float* similarity, size_t threads, Effort effort = Effort::kLeast);

// Whether rows are first chosen by scores (preselection.inl.h) for metrics that have them: where that is faster on this
// machine, never, or wherever it can be done. The results are the same, bit for bit.
enum class Preselection { kAuto, kNever, kAlways };
void set_preselection(Preselection when);
// What kAuto does for a metric at the level in use.
bool preselection_pays(Metric metric);
// For tests: queries, counted once for each group, whose distance was found so by all calls until now.
uint64_t preselected();

// For tests: whether `watermark` computes every distance in full; to forget where bounds were not worth their while;
// and how it decided the distances of all calls so far.
void set_exhaustive(bool on);
void forget_bounds();
BoundedCounts bounded_counts();

}  // namespace honeytrace
