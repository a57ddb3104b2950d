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
    const float* packed;  // [groups][panels][features][kLanes], then the order: int32 [groups][features]
    const float* norms;   // [groups][panels * kLanes]
    size_t groups, rows, features;

    size_t panels() const { return (rows + kLanes - 1) / kLanes; }
    const float* packed_of(size_t group) const { return packed + group * panels() * features * kLanes; }
    // The feature that lies at each place of the panels.
    const int32_t* order_of(size_t group) const {
        return reinterpret_cast<const int32_t*>(packed_of(groups)) + group * features;
    }
    const float* norms_of(size_t group) const { return norms + group * panels() * kLanes; }
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

// For tests: whether `watermark` computes every distance in full; to forget where bounds were not worth their while;
// and how it decided the distances of all calls so far.
void set_exhaustive(bool on);
void forget_bounds();
BoundedCounts bounded_counts();

}  // namespace honeytrace
