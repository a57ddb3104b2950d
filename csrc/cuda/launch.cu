#include "cuda/launch.h"

#include <algorithm>

#include "cuda/compose.cuh"
#include "cuda/few.cuh"
#include "cuda/mix.cuh"
#include "cuda/rows.cuh"
#include "cuda/selection.h"
#include "cuda/tile.cuh"

namespace honeytrace::device {
namespace {

// Below this many queries a tile would be mostly empty.
constexpr int kFewQueries = 16;
// Blocks that a multiprocessor holds of each distance kernel, by registers (tests/test_cuda_compile.py reads them).
constexpr int kBlocksOfTile = 4, kBlocksOfFew = 4;
constexpr int kMostParts = 64;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
size_t take(size_t& used, int64_t count) {
    const size_t begin = used;
    used += divide_up(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return begin;
}

template <class T>
T* at(const Device& device, size_t offset) {
    return reinterpret_cast<T*>(static_cast<char*>(device.workspace) + offset);
}

cudaError_t make_current(const Device& device) {
    int current = -1;
    const cudaError_t error = cudaGetDevice(&current);
    return error != cudaSuccess || current == device.index ? error : cudaSetDevice(device.index);
}

RowsTask rows_task(const RowsView& features) {
    RowsTask task{};
    task.features = features;
    return task;
}

cudaError_t launch_rows(const RowsTask& task, Role first, int roles, const Device& device) {
    const size_t shared = std::max(sizeof(PrepareMemory), sizeof(HashMemory));
    const unsigned panels = static_cast<unsigned>(divide_up(task.features.rows, kPanel));
    HT_LAUNCH(rows_kernel, dim3(panels, static_cast<unsigned>(roles)), kThreads, shared, device.stream, task,
              static_cast<int>(first));
    return cudaGetLastError();
}

void set_planes(RowsTask& task, const Planes& planes, int64_t* bucket) {
    task.planes = planes.data;
    task.n_planes = planes.count;
    task.planes_aligned = reinterpret_cast<uintptr_t>(planes.data) % 16 == 0 && task.features.columns % 4 == 0;
    task.bucket = bucket;
}

cudaError_t launch_metric(const DistanceProblem& problem, const Neighbours& neighbours, bool few, void* stream) {
    switch (neighbours.metric) {
        case Metric::kL1: return launch_l1(problem, few, stream);
        case Metric::kL2: return launch_l2(problem, few, stream);
        case Metric::kCosine: return launch_cosine(problem, few, stream);
        default: return launch_lp(problem, neighbours.p, few, stream);
    }
}

DistanceProblem problem_of(const RowsView& features, const Bank& bank, const Neighbours& neighbours, const Plan& plan,
                           const Device& device) {
    DistanceProblem problem{};
    problem.queries = at<float>(device, plan.queries);
    problem.state = at<uint8_t>(device, plan.state);
    problem.packed = bank.packed;
    problem.norms = bank.norms;
    const int64_t panels = divide_up(bank.rows, kPanel);
    problem.order = reinterpret_cast<const int32_t*>(bank.packed + bank.groups * panels * features.columns * kPanel);
    problem.keys = at<uint64_t>(device, plan.keys);
    problem.above = at<uint64_t>(device, plan.above);
    problem.skipped = at<uint8_t>(device, plan.skipped);
    problem.exhaustive = at<uint8_t>(device, plan.exhaustive);
    problem.batch = features.rows;
    problem.features = features.columns;
    problem.groups = bank.groups;
    problem.rows = bank.rows;
    problem.k = neighbours.k;
    problem.parts = plan.parts;
    problem.part_panels = plan.part_panels;
    return problem;
}

void set_prepared(RowsTask& task, const Neighbours& neighbours, const Plan& plan, const Device& device) {
    task.queries = at<float>(device, plan.queries);
    task.state = at<uint8_t>(device, plan.state);
    task.unit = neighbours.metric == Metric::kCosine;
}

cudaError_t select_all(DistanceProblem problem, const Neighbours& neighbours, const Plan& plan, const Device& device) {
    for (problem.done = 0; problem.done < problem.k; problem.done += problem.kept) {
        problem.kept = std::min(kMostKept, problem.k - problem.done);
        const cudaError_t error = launch_metric(problem, neighbours, plan.few, device.stream);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

Plan plan_for(const RowsView& features, const Bank& bank, const Neighbours& neighbours, const Device& device) {
    return plan_of(features.rows, features.columns, bank.groups, bank.rows, neighbours.k, device.multiprocessors);
}

}  // namespace

Plan plan_of(int batch, int features, int groups, int rows, int k, int multiprocessors) {
    Plan plan{};
    const int64_t panels = divide_up(rows, kPanel), tile_panels = kTile / kPanel;
    const int64_t tiles = divide_up(batch, kTile) * groups * divide_up(panels, tile_panels);
    // Where tiles are fewer than half of the multiprocessors, smaller pieces finish earlier although each costs more.
    plan.few = batch < kFewQueries || 2 * tiles < multiprocessors;
    const int64_t step = plan.few ? kWarps : tile_panels;
    const int64_t blocks = (plan.few ? divide_up(batch, kQuad) : divide_up(batch, kTile)) * groups;
    const int64_t room = int64_t{multiprocessors} * (plan.few ? kBlocksOfFew : kBlocksOfTile);
    const int64_t steps = divide_up(panels, step);
    const int64_t parts =
        std::clamp<int64_t>(divide_up(room, std::max<int64_t>(blocks, 1)), 1, std::min<int64_t>(steps, kMostParts));
    plan.part_panels = static_cast<int>(divide_up(steps, parts) * step);
    plan.parts = static_cast<int>(divide_up(panels, plan.part_panels));  // no empty part at the end
    plan.kept = std::min(k, kMostKept);

    const int64_t padded = divide_up(batch, kPanel) * kPanel, pairs = int64_t{batch} * groups;
    plan.queries = take<float>(plan.bytes, padded * features);
    plan.state = take<uint8_t>(plan.bytes, padded);
    plan.keys = take<uint64_t>(plan.bytes, pairs * plan.parts * plan.kept);
    plan.above = take<uint64_t>(plan.bytes, pairs);
    plan.skipped = take<uint8_t>(plan.bytes, pairs * plan.parts);
    plan.exhaustive = take<uint8_t>(plan.bytes, pairs);
    plan.confidence = take<float>(plan.bytes, batch);
    plan.distance = take<float>(plan.bytes, pairs);
    plan.bucket = take<int64_t>(plan.bytes, batch);
    return plan;
}

int feature_distance(const RowsView& features, const Bank& bank, const Neighbours& neighbours, float* distance,
                     int32_t* index, const Device& device) {
    if (features.rows == 0) return cudaSuccess;
    if (const cudaError_t error = make_current(device); error != cudaSuccess) return error;
    const Plan plan = plan_for(features, bank, neighbours, device);
    RowsTask rows = rows_task(features);
    set_prepared(rows, neighbours, plan, device);
    if (const cudaError_t error = launch_rows(rows, Role::kPrepare, 1, device); error != cudaSuccess) return error;
    DistanceProblem problem = problem_of(features, bank, neighbours, plan, device);
    problem.distance = distance;
    problem.index = index;
    return select_all(problem, neighbours, plan, device);
}

int sign_hash(const RowsView& features, const Planes& planes, int64_t* bucket, const Device& device) {
    if (features.rows == 0) return cudaSuccess;
    if (const cudaError_t error = make_current(device); error != cudaSuccess) return error;
    RowsTask rows = rows_task(features);
    set_planes(rows, planes, bucket);
    return launch_rows(rows, Role::kHash, 1, device);
}

int watermark_mix(const MixTask& task, const Device& device) {
    if (task.logits.rows == 0) return cudaSuccess;
    if (const cudaError_t error = make_current(device); error != cudaSuccess) return error;
    HT_LAUNCH(mix_kernel, dim3(static_cast<unsigned>(task.logits.rows)), kThreads, sizeof(MixMemory), device.stream,
              task);
    return cudaGetLastError();
}

int watermark(const RowsView& features, const Bank& bank, const Neighbours& neighbours, const Planes& planes,
              MixTask task, const Device& device) {
    if (features.rows == 0) return cudaSuccess;
    if (const cudaError_t error = make_current(device); error != cudaSuccess) return error;
    const Plan plan = plan_for(features, bank, neighbours, device);
    int64_t* bucket = at<int64_t>(device, plan.bucket);
    const bool with_confidence = task.far.confidence_weight != 0.0f;
    RowsTask rows = rows_task(features);
    set_prepared(rows, neighbours, plan, device);
    set_planes(rows, planes, bucket);
    rows.logits = task.logits;
    rows.confidence = at<float>(device, plan.confidence);
    const cudaError_t prepared = launch_rows(rows, Role::kPrepare, with_confidence ? 3 : 2, device);
    if (prepared != cudaSuccess) return prepared;

    task.far.confidence = with_confidence ? rows.confidence : nullptr;
    DistanceProblem problem = problem_of(features, bank, neighbours, plan, device);
    problem.distance = at<float>(device, plan.distance);
    // The bound on a mean is made for one pass.
    if (neighbours.k <= kMostKept) problem.far = task.far;
    const cudaError_t selected = select_all(problem, neighbours, plan, device);
    if (selected != cudaSuccess) return selected;

    task.source = problem.distance;
    task.state = problem.state;
    task.bucket = bucket;
    return watermark_mix(task, device);
}

int compose(const ComposeTask& task, const Device& device) {
    if (task.count == 0) return cudaSuccess;
    if (const cudaError_t error = make_current(device); error != cudaSuccess) return error;
    const int64_t of_block = int64_t{kThreads} * kComposed;
    HT_LAUNCH(compose_kernel, dim3(static_cast<unsigned>(divide_up(task.count, of_block))), kThreads, 0, device.stream,
              task);
    return cudaGetLastError();
}

const char* error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace honeytrace::device
