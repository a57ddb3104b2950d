// What the kernels are told: rows of tensors, and the steps that are done for each of them. Plain data, for host
// compilers as well.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/level.h"
// After level.h, which names the level.
#include "core/mixing.h"

namespace honeytrace::device {

// Rows of a panel: element d of row m lies at ((m / 16) * D + d) * 16 + m % 16.
constexpr int kPanel = 16;

// Similarity of the fused operation. `offset` is null where plain distances are wanted.
struct FarRule {
    const float* offset;      // [groups]
    const float* scale;       // [groups]
    const float* confidence;  // [batch], -1 for logits that are not finite; null where the weight is 0
    float confidence_weight;
};

enum class Type : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

HONEYTRACE_HD int size_of(Type type) { return type == Type::kFloat32 ? 4 : 2; }

// Rows of `columns` adjacent elements, `stride` elements apart.
struct RowsView {
    const void* data;
    Type type;
    int rows, columns;
    int64_t stride;
    bool aligned;  // each row starts at a multiple of 16 bytes
    HONEYTRACE_HD const char* row(int64_t i) const {
        return static_cast<const char*>(data) + i * stride * size_of(type);
    }
};

struct RowsTask {
    RowsView features;
    // prepare: null where nothing needs it
    float* queries;
    uint8_t* state;
    bool unit;
    // hash
    const float* planes;  // [n_planes][features]
    int n_planes;
    bool planes_aligned;
    int64_t* bucket;
    // confidence
    RowsView logits;
    float* confidence;
};

struct MixTask {
    RowsView logits;
    void* out;            // [rows][columns], type of the logits
    const float* source;  // [rows][groups]: similarity, or distance where `far.offset` is given
    float* similarity;    // [rows][groups], written where `far.offset` is given
    FarRule far;
    const uint8_t* state;        // of the queries, where `far.offset` is given
    const float* target_logits;  // [groups][columns]
    bool targets_aligned, out_aligned;
    const int64_t* bucket;
    int groups;
    MixingRule rule;
    uint64_t seed;
    int64_t* group;
    bool* flipped;
};

// a, b, out: `count` adjacent elements of a type; the mask's element for element (x, y, z) of [outer, middle, inner]
// lies at the sum of the three steps.
struct ComposeTask {
    const void* a;
    const void* b;
    const void* mask;
    void* out;
    Type type, mask_type;
    int64_t count, middle, inner, outer_step, middle_step, inner_step;
};

}  // namespace honeytrace::device
