#include "cuda/selection.cuh"

namespace honeytrace::device {
namespace {

template <class M>
M with_exponent(double p) {
    M metric{};
    metric.exponent = static_cast<float>(p);
    metric.inverse = static_cast<float>(1.0 / p);
    metric.inverse_low = static_cast<float>(1.0 / p - metric.inverse);
    return metric;
}

}  // namespace

// Exponents as core/metrics.h has them: 3/2, 3 and 4 by themselves, multiples of a half by products, others by
// logarithm.
cudaError_t launch_lp(const DistanceProblem& problem, double exponent, bool few, void* stream) {
    const double p = static_cast<float>(exponent);  // the rounded exponent is the exponent
    if (p == 1.0) return launch_l1(problem, few, stream);
    if (p == 2.0) return launch_l2(problem, few, stream);
    if (p == 1.5) return launch_selection(with_exponent<LpThreeHalves>(p), problem, few, stream);
    if (p == 3.0) return launch_selection(with_exponent<L3>(p), problem, few, stream);
    if (p == 4.0) return launch_selection(with_exponent<L4>(p), problem, few, stream);
    if (p <= 16.0 && 2.0 * p == static_cast<double>(static_cast<unsigned>(2.0 * p))) {
        LpHalves metric = with_exponent<LpHalves>(p);
        metric.twice = static_cast<unsigned>(2.0 * p);
        return launch_selection(metric, problem, few, stream);
    }
    return launch_selection(with_exponent<LpAny>(p), problem, few, stream);
}

}  // namespace honeytrace::device
