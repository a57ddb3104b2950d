#include "cuda/selection.cuh"

namespace honeytrace::device {

cudaError_t launch_l2(const DistanceProblem& problem, bool few, void* stream) {
    return launch_selection(L2{}, problem, few, stream);
}

}  // namespace honeytrace::device
