#include "cuda/selection.cuh"

namespace honeytrace::device {

cudaError_t launch_cosine(const DistanceProblem& problem, bool few, void* stream) {
    return launch_selection(Cosine{}, problem, few, stream);
}

}  // namespace honeytrace::device
