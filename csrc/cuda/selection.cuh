// Launches the three kernels of feature_distance for one metric; each metric_*.cu compiles its own.
#pragma once

#include "cuda/few.cuh"
#include "cuda/selection.h"
#include "cuda/tile.cuh"

namespace honeytrace::device {

template <class M>
cudaError_t launch_selection(const M& metric, const DistanceProblem& problem, bool few, void* stream) {
    const unsigned quads = static_cast<unsigned>((problem.batch + kQuad - 1) / kQuad);
    const unsigned tiles = static_cast<unsigned>((problem.batch + kTile - 1) / kTile);
    const unsigned parts = static_cast<unsigned>(problem.parts), groups = static_cast<unsigned>(problem.groups);
    if (few) {
        HT_LAUNCH(few_kernel<M>, dim3(quads, parts, groups), kThreads, sizeof(FewMemory), stream, metric, problem);
    } else {
        HT_LAUNCH(tile_kernel<M>, dim3(tiles, parts, groups), kThreads, sizeof(TileMemory), stream, metric, problem);
    }
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
    HT_LAUNCH(merge_kernel<M>, dim3(quads, groups), kThreads, sizeof(FewMemory), stream, metric, problem);
    return cudaGetLastError();
}

}  // namespace honeytrace::device
