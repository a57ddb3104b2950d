// The kernels for AVX-512 (F, BW, VL, DQ).
#define HONEYTRACE_LEVEL avx512

#include "cpu/vec_avx512.h"

namespace honeytrace::HONEYTRACE_LEVEL {

// Sums of a full tile: 16 x 1 of the 32 registers.
constexpr int kQueryTile = 16;
constexpr int kPanelsOf8 = 2;
constexpr int kPanelsOf4 = 4;
constexpr int kPanelsOf1 = 8;

}  // namespace honeytrace::HONEYTRACE_LEVEL

#include "cpu/level.inl.h"
