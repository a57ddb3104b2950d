// The CUDA operations on plain pointers and a stream. Nothing here allocates or waits: the caller gives the
// workspace (Plan::bytes), so that CUDA graphs can capture every call. Each returns a cudaError_t
// as an integer.
//
// A result never depends on the workspace's plan: queries are computed as each would be alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/tasks.h"

namespace honeytrace::device {

enum class Metric : int { kL1 = 0, kL2 = 1, kLp = 2, kCosine = 3 };

struct Neighbours {
    int k;
    Metric metric;
    double p;
};

// Trigger banks as pack_panels of honeytrace/ops/bank.py lays them out: panels of 16 rows, then the order of the
// features, int32 [groups][features].
struct Bank {
    const float* packed;
    const float* norms;
    int groups, rows;
};

// How the work of feature_distance is cut, and what the workspace holds.
struct Plan {
    bool few;
    int kept, parts, part_panels;
    size_t queries, state, keys, above, skipped, exhaustive, confidence, distance, bucket;  // offsets in bytes
    size_t bytes;
};

Plan plan_of(int batch, int features, int groups, int rows, int k, int multiprocessors);

// Where to run. The runtime linked into this module has a current device of its own, so it is told the device; that is
// the one the caller has made current anyway.
struct Device {
    int index, multiprocessors;
    void* stream;
    void* workspace;
};

// distance: [rows][groups]; index: [rows][groups][k] or null.
int feature_distance(const RowsView& features, const Bank& bank, const Neighbours& neighbours, float* distance,
                     int32_t* index, const Device& device);

struct Planes {
    const float* data;  // [count][features]
    int count;
};

int sign_hash(const RowsView& features, const Planes& planes, int64_t* bucket, const Device& device);

int watermark_mix(const MixTask& task, const Device& device);

// task: what mixing reads and writes; its source, state, bucket and far.confidence are filled in here.
int watermark(const RowsView& features, const Bank& bank, const Neighbours& neighbours, const Planes& planes,
              MixTask task, const Device& device);

int compose(const ComposeTask& task, const Device& device);

const char* error_name(int error);
const char* error_text(int error);

}  // namespace honeytrace::device
