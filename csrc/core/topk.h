// The k smallest of a stream of (distance, row) pairs, held as one 64-bit key each.
//
// A distance is never negative and never NaN, so its bits order as its value does; with the row below them one
// integer comparison orders by (distance, row). Small k: a sorted array and insertion. Large k: a max-heap.
#pragma once

#include <cstddef>
#include <cstdint>

#include "halves.h"
#include "hd.h"

namespace honeytrace {

// The k smallest keys of one query so far; `keys` has room for k, `count` were offered.
struct SmallestK {
    uint64_t* keys;
    size_t k, count;
};

}  // namespace honeytrace

namespace honeytrace::HONEYTRACE_LEVEL {

// Up to here a sorted array beats a heap: its insertion has no branch to guess wrong (measured at 100 and 200).
constexpr size_t kLargestSortedK = 256;

HONEYTRACE_HD uint64_t key_of(float distance, uint32_t row) {
    return (static_cast<uint64_t>(bits_of(distance)) << 32) | row;
}
HONEYTRACE_HD float distance_of(uint64_t key) { return float_of(static_cast<uint32_t>(key >> 32)); }
HONEYTRACE_HD uint32_t row_of(uint64_t key) { return static_cast<uint32_t>(key); }

// keys[0..k) ascending; puts `key` in its place and drops the last. No branch and no chain: every slot takes the
// middle of its old key, its left neighbour's and the new one.
HONEYTRACE_HD void insert_sorted(uint64_t* keys, size_t k, uint64_t key) {
    for (size_t slot = k - 1; slot > 0; --slot) {
        const uint64_t left = keys[slot - 1], lower = keys[slot] < key ? keys[slot] : key;
        keys[slot] = left > lower ? left : lower;
    }
    keys[0] = keys[0] < key ? keys[0] : key;
}

HONEYTRACE_HD void sift_down(uint64_t* heap, size_t count, size_t parent, uint64_t key) {
    for (size_t child = 2 * parent + 1; child < count; child = 2 * parent + 1) {
        if (child + 1 < count && heap[child + 1] > heap[child]) ++child;
        if (heap[child] <= key) break;
        heap[parent] = heap[child];
        parent = child;
    }
    heap[parent] = key;
}

HONEYTRACE_HD void make_heap(uint64_t* heap, size_t count) {
    for (size_t parent = count / 2; parent-- > 0;) sift_down(heap, count, parent, heap[parent]);
}

// Turns a max-heap into an ascending array.
HONEYTRACE_HD void sort_heap(uint64_t* heap, size_t count) {
    for (size_t last = count; last-- > 1;) {
        const uint64_t largest = heap[0];
        sift_down(heap, last, 0, heap[last]);
        heap[last] = largest;
    }
}

// An empty set. Its keys stand for infinitely far rows behind all real ones.
HONEYTRACE_HD SmallestK empty_set(uint64_t* keys, size_t k) {
    for (size_t i = 0; i < k; ++i) keys[i] = key_of(__builtin_inff(), ~0u);
    return {keys, k, 0};
}

HONEYTRACE_HD bool is_full(const SmallestK& set) { return set.count >= set.k; }

// Once the set is full a distance not below this one changes nothing.
HONEYTRACE_HD float bound_of(const SmallestK& set) {
    return distance_of(set.k <= kLargestSortedK ? set.keys[set.k - 1] : set.keys[0]);
}

// Any order of the stream gives the same set.
HONEYTRACE_HD void offer(SmallestK& set, uint64_t key) {
    if (set.k <= kLargestSortedK) {
        insert_sorted(set.keys, set.k, key);
    } else if (set.count < set.k) {
        set.keys[set.count] = key;
        if (set.count + 1 == set.k) make_heap(set.keys, set.k);
    } else if (key < set.keys[0]) {
        sift_down(set.keys, set.k, 0, key);
    }
    ++set.count;
}

// Brings the keys into ascending order; once, when at least k of them have been offered.
HONEYTRACE_HD void sort_keys(SmallestK& set) {
    if (set.k > kLargestSortedK) sort_heap(set.keys, set.k);
}

// The mean of the k distances, summed in ascending order.
HONEYTRACE_HD float mean_distance(const SmallestK& set) {
    float sum = 0.0f;
    for (size_t i = 0; i < set.k; ++i) sum += distance_of(set.keys[i]);
    return sum / static_cast<float>(set.k);
}

}  // namespace honeytrace::HONEYTRACE_LEVEL
