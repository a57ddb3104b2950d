// The kernels for the baseline of the platform, without intrinsics.
#define HONEYTRACE_LEVEL scalar

#include "cpu/vec_scalar.h"

namespace honeytrace::HONEYTRACE_LEVEL {

// Sums of a full tile: 4 x 1 x 4 registers of 4 floats.
constexpr int kQueryTile = 4;
constexpr int kPanelsOf8 = 1;
constexpr int kPanelsOf4 = 1;
constexpr int kPanelsOf1 = 2;

}  // namespace honeytrace::HONEYTRACE_LEVEL

#include "cpu/level.inl.h"
