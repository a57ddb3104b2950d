// The k smallest keys (core/topk.h) of a stream, held by a warp: lane i has the i-th smallest, k <= 32.
#pragma once

#include "cuda/scalar.h"
// After scalar.h, which names the level.
#include "core/topk.h"

namespace honeytrace::device {

constexpr int kWarpLanes = 32;
// More neighbours take several passes, each past the last key of the one before.
constexpr int kMostKept = kWarpLanes;
// Beyond every key: no distance has these bits.
constexpr uint64_t kNoKey = ~uint64_t{0};

HT_DEVICE int lane_index() { return thread_index() % kWarpLanes; }
HT_DEVICE int warp_index() { return thread_index() / kWarpLanes; }

// Puts one key, the same in all lanes, in its place and drops the last. The whole warp calls it.
HT_DEVICE uint64_t insert_key(uint64_t mine, int k, uint64_t key) {
    const int lane = lane_index();
    const int place = count_bits(ballot(lane < k && mine < key));
    const uint64_t left = shuffle(mine, lane > 0 ? lane - 1 : 0);
    if (lane < k && lane >= place) mine = lane == place ? key : left;
    return mine;
}

// Offers one key from each lane, kNoKey where a lane has none. The set does not depend on the order.
HT_DEVICE uint64_t offer_keys(uint64_t mine, int k, uint64_t offered) {
    uint32_t waiting = ballot(offered < shuffle(mine, k - 1));
    while (waiting != 0) {
        const uint64_t key = shuffle(offered, lowest_bit(waiting));
        mine = insert_key(mine, k, key);
        waiting &= waiting - 1;
        waiting &= ballot(offered < shuffle(mine, k - 1));
    }
    return mine;
}

// Sum of the k distances in ascending order, on top of `sum`.
HT_DEVICE float add_distances(uint64_t mine, int k, float sum) {
    for (int i = 0; i < k; ++i) sum += distance_of(shuffle(mine, i));
    return sum;
}

}  // namespace honeytrace::device
