// The kernels for NEON on AArch64.
#define HONEYTRACE_LEVEL neon

#include "cpu/vec_neon.h"

namespace honeytrace::HONEYTRACE_LEVEL {

// Sums of a full tile: 4 x 1 x 4 of the 32 registers.
constexpr int kQueryTile = 4;
constexpr int kPanelsOf8 = 1;
constexpr int kPanelsOf4 = 1;
constexpr int kPanelsOf1 = 4;

}  // namespace honeytrace::HONEYTRACE_LEVEL

#include "cpu/level.inl.h"
