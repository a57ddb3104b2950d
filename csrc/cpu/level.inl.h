// The table of a level. Included last by each level_<name>.cpp.
#pragma once

#include "cpu/distance.inl.h"
#include "cpu/mixing.inl.h"
#include "cpu/rows.inl.h"

#define HT_STRINGIFY(x) #x
#define HT_NAME(x) HT_STRINGIFY(x)

namespace honeytrace::HONEYTRACE_LEVEL {

extern const Kernels kKernels;
const Kernels kKernels = {HT_NAME(HONEYTRACE_LEVEL),
                          load_rows_kernel,
                          normalise_rows_kernel,
                          transpose_kernel,
                          distance_kernel,
                          ceiling_kernel,
                          score_ceiling_kernel,
                          sign_hash_kernel,
                          softmax_kernel,
                          bend_kernel};

}  // namespace honeytrace::HONEYTRACE_LEVEL
