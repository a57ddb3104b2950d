// What a level offers: one table of functions, and the plain structs they take. This is the only thing that the
// translation units of different instruction sets share, so it holds data and no code.
#pragma once

#include <cstddef>
#include <cstdint>

namespace honeytrace {

struct SmallestK;  // core/topk.h

constexpr size_t kLanes = 16;  // bank rows in a panel, on every level

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };
enum class Metric : int { kL1 = 0, kL2 = 1, kLp = 2, kCosine = 3 };

// Rows to be read as float32: `rows` x `columns` at a distance of `stride` elements.
struct RowSource {
    const void* data;
    DType dtype;
    size_t rows, columns, stride;
};

// Converts rows to float32 at `out` (row stride out_stride); a row with a NaN or infinity becomes zeros and gets
// finite[row] = 0.
struct LoadTask {
    RowSource source;
    float* out;
    size_t out_stride;
    uint8_t* finite;
};

// How the distances of a bounded task were decided, in queries of a group.
struct BoundedCounts {
    uint64_t without_looking;  // no distance could be small enough
    uint64_t by_bounds;        // proven by the sums over some of the features
    uint64_t finished;         // computed
};

// Scratch of preselection.inl.h: what it knows of each query of a block, and room for the rows it chose for one.
struct ScoreScratch {
    float *shift, *margin;  // [batch]
    uint32_t* count;        // [batch]
    uint64_t* candidates;   // [batch][candidate_room(k)]
    float* panel;           // [features][kLanes]
    float* query;           // [features]
    uint64_t* decided;      // queries of a group that were decided so are added here
};

// Mean of the k smallest distances of each query of a block to the rows of one group.
struct DistanceTask {
    float* queries;  // [batch][query_stride] float32, finite; cosine normalises it in place
    size_t query_stride, batch, features;
    const float* packed;   // [panels][features][kLanes]
    const int32_t* order;  // the feature at each place of a panel
    const float* norms;    // [panels * kLanes]
    // For preselection.inl.h, null where rows are not to be chosen by their scores first.
    const float* by_row;                    // the rows again: [panels * kLanes][features] in that order
    const float *half_sums, *half_squares;  // half of each row's sum, and of its squared norm: [panels * kLanes]
    size_t rows, k;
    Metric metric;
    double p;
    const uint8_t* finite;
    uint8_t* nonzero;  // [batch], written by normalise_rows, read for cosine
    // Distances of query i below enough[i] are wanted; others may come as infinity. Null: all are wanted.
    const float* enough;
    // Every row is offered to the k smallest, also one that cannot be among them: time does not depend on how near the
    // rows are. The result is the same.
    bool every_row;
    BoundedCounts* counts;    // added to where `enough` is given
    const float* transposed;  // the queries as [features][batch]
    float* tiles;             // scratch [batch * features]
    float* unit_panels;       // scratch [min(panels, panel_step)][features][kLanes] for cosine
    float* beyond;            // scratch [batch]
    uint32_t* lists;          // scratch [2 * batch]
    float* partial;           // scratch [batch][partial_stride(rows)] where `enough` is given
    uint64_t* keys;           // scratch [batch * k]
    ScoreScratch scores;      // where `by_row` is given
    SmallestK* smallest;      // scratch [batch]
    float* distance;          // element of query i at distance[i * distance_stride]
    size_t distance_stride;
    int32_t* index;  // k of query i at index[i * index_stride], or null
    size_t index_stride;
};

// [rows][columns] at row_stride to [columns][rows].
struct TransposeTask {
    const float* in;
    size_t row_stride, rows, columns;
    float* out;
};

struct HashTask {
    const float* queries;
    size_t query_stride, batch, features;
    const float* planes;  // [n_planes][features]
    size_t n_planes;
    const uint8_t* finite;
    int64_t* bucket;
};

// What a row's softmax needs: its largest logit and sum exp(logit - largest), the latter only if asked for.
struct Softmax {
    bool finite;  // no NaN or infinity among the logits; otherwise the rest is 0
    float largest, sum;
};
struct SoftmaxTask {
    const void* row;
    DType dtype;
    size_t columns;
    bool with_sum;
    float* wide;  // the row as float32 is written here; null for a float32 row, which is read where it is
};

// Bends the answer of one row towards a target; without logits the answer is the target. The logs are of 1 - w, and
// of w times the sum of exp(logit).
struct BendTask {
    const float* logits;
    const float* target;
    size_t columns;
    int space;  // 0 logits, 1 probabilities
    float weight, log_keep, take, target_lse, target_lse_low;
    DType dtype;
    void* out;
};

struct Kernels {
    const char* name;
    void (*load_rows)(const LoadTask&);
    void (*normalise_rows)(const DistanceTask&);
    void (*transpose)(const TransposeTask&);
    void (*distance)(const DistanceTask&);
    uint64_t (*ceiling)(Metric metric, double p, uint64_t repeats);
    uint64_t (*score_ceiling)(Metric metric, uint64_t repeats);
    void (*sign_hash)(const HashTask&);
    Softmax (*softmax)(const SoftmaxTask&);
    void (*bend)(const BendTask&);
};

}  // namespace honeytrace
