// The selection of one metric, as launch.cu calls it; each metric_*.cu holds its own.
#pragma once

#include "cuda/problem.h"

namespace honeytrace::device {

// One pass of the selection, `few` kernels or tiles, and the joining of its parts.
cudaError_t launch_l1(const DistanceProblem& problem, bool few, void* stream);
cudaError_t launch_l2(const DistanceProblem& problem, bool few, void* stream);
cudaError_t launch_cosine(const DistanceProblem& problem, bool few, void* stream);
cudaError_t launch_lp(const DistanceProblem& problem, double p, bool few, void* stream);

}  // namespace honeytrace::device
