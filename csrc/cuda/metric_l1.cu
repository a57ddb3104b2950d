#include "cuda/selection.cuh"

namespace honeytrace::device {

cudaError_t launch_l1(const DistanceProblem& problem, bool few, void* stream) {
    return launch_selection(L1{}, problem, few, stream);
}

}  // namespace honeytrace::device
