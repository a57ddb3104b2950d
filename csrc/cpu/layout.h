// Sizes that the operations and the kernels of a level agree on.
//
// Functions, so they live in the namespace of a level each (core/hd.h says why); ops.cpp sees those of `baseline`.
#pragma once

#include "core/hd.h"
#include "cpu/kernels.h"

namespace honeytrace::HONEYTRACE_LEVEL {

// Panels that stay in the second-level cache while all queries of a block pass over them. Of whole panels, though a
// pass may read a part: parts at the distance of panels share few sets of the cache.
constexpr size_t kPanelBytes = 256 * 1024;

HONEYTRACE_HD size_t panels_of(size_t rows) { return (rows + kLanes - 1) / kLanes; }

// At least eight: few queries take so many at a time, to have enough sums in flight.
HONEYTRACE_HD size_t panel_step(size_t features) {
    const size_t fitting = kPanelBytes / (features * kLanes * sizeof(float));
    return fitting < 8 ? 8 : fitting - fitting % 8;
}

// Candidates that are kept for a query before rows are dropped that the k-th nearest has left behind since.
HONEYTRACE_HD size_t candidate_room(size_t k) { return 4 * k + 4 * kLanes; }

// Below four queries reading the bank is the limit; where a good part of the rows is among the k nearest, choosing them
// saves little.
HONEYTRACE_HD bool can_preselect(size_t batch, size_t rows, size_t k) { return batch >= 4 && rows >= 8 * k; }

// Floats from one query's partial sums to the next one's: an odd number of cache lines, so that the rows of a tile do
// not all fall into the same few sets of the cache.
HONEYTRACE_HD size_t partial_stride(size_t rows) { return (panels_of(rows) | 1) * kLanes; }

}  // namespace honeytrace::HONEYTRACE_LEVEL
