// The kernels for AVX2 with FMA and F16C.
#define HONEYTRACE_LEVEL avx2

#include "cpu/vec_avx2.h"

namespace honeytrace::HONEYTRACE_LEVEL {

// Sums of a full tile: 4 x 1 x 2 of the 16 registers.
constexpr int kQueryTile = 4;
constexpr int kPanelsOf8 = 1;
constexpr int kPanelsOf4 = 1;
constexpr int kPanelsOf1 = 4;

}  // namespace honeytrace::HONEYTRACE_LEVEL

#include "cpu/level.inl.h"
