// The k nearest rows in two steps, for machines where a difference costs a slot that a multiply-add could have used.
//
// First every row gets a score, which orders the rows as the distance does but takes one instruction a feature less
// and cancels for near rows:
//
//   l2      |q - b|^2 / 2 - |q|^2 / 2        = |b|^2 / 2 - q.b
//   cosine  |q - b|^2 / 2 - 1, unit vectors  = -q.b / |b|
//   l1      sum |q - b| / 2 - sum q / 2      = sum max(q, b) - sum b / 2
//
// Then the rows whose score leaves it open that they are among the k nearest, hardly more than k of them, get their
// distances by the very sums that the tiles would have made. So the result is that of the tiles, bit for bit.
//
// What a score leaves open. Let r = |q| + max |b| (times the square root of D for l1; 2 for cosine) and
// s = r^2 (r for l1), u = 2^-24, n = min(D, kFeatureBlock) + D / kFeatureBlock. A sum of products or maxima errs by at
// most n u s; so does, of half the sum of the tiles, that sum itself, for |q - b| <= r. Adding the row's and the
// query's constants, which are rounded themselves, takes 4 u s more. With margin = 2 (n + 16) u s, a row whose score is
// above the k-th smallest score by more than 2 margin has a larger sum than k other rows, by more than 16 u s, which
// neither the division nor the root that follow make up for: it is not among the k nearest, whatever its number.
#pragma once

#include "cpu/tiles.inl.h"

namespace honeytrace::HONEYTRACE_LEVEL {

// The range of |q| + max |b|: within it neither a score nor the squares that |q| is made of lose to underflow what the
// margin could notice, even where subnormal numbers are flushed (2^-126 a term); nor does a sum overflow.
constexpr float kSmallestReach = 0x1p-30f;
constexpr float kLargestReach = 0x1p50f;

// A candidate list that is given up: too many rows are too near to one another.
constexpr uint32_t kGivenUp = ~0u;

// The score that goes with a metric. Metrics without one are computed in full.
template <class M>
struct Score {
    static constexpr bool kExists = false;
};

template <>
struct Score<L2> {
    static constexpr bool kExists = true;
    static constexpr bool kCosine = false;  // the rows come as they are
    template <class V>
    HT_INLINE V accumulate(Spread q, V b, V sum) const {
        return fma(b, q, sum);
    }
    HT_INLINE Lanes score(const DistanceTask& task, Lanes sum, size_t panel) const {
        return sub(load(task.half_squares + panel * kLanes), sum);
    }
    static HT_INLINE float scale(float reach, float) { return reach * reach; }
    static HT_INLINE float shift(float, float square) { return 0.5f * square; }
};

template <>
struct Score<Cosine> : Score<L2> {
    HT_INLINE Lanes score(const DistanceTask& task, Lanes sum, size_t panel) const {
        return sub(fill(0.0f), mul(sum, inverse_norms_of(task.norms + panel * kLanes)));
    }
    static HT_INLINE float scale(float, float) { return 4.0f; }
    static HT_INLINE float shift(float, float) { return 1.0f; }
};

template <>
struct Score<L1> {
    static constexpr bool kExists = true;
    static constexpr bool kCosine = false;
    template <class V>
    HT_INLINE V accumulate(Spread q, V b, V sum) const {
        return add(sum, maximum(b, q));
    }
    HT_INLINE Lanes score(const DistanceTask& task, Lanes sum, size_t panel) const {
        return sub(sum, load(task.half_sums + panel * kLanes));
    }
    static HT_INLINE float scale(float reach, float features) { return reach * __builtin_sqrtf(features); }
    static HT_INLINE float shift(float sum, float) { return -0.5f * sum; }
};

// Keeps the candidates that the k-th smallest score so far leaves open, or gives the query up.
inline __attribute__((noinline)) void drop_candidates(const DistanceTask& task, size_t query) {
    const size_t room = candidate_room(task.k);
    uint64_t* candidates = task.scores.candidates + query * room;
    uint32_t kept = 0;
    for (uint32_t i = 0; i < task.scores.count[query]; ++i)
        if (distance_of(candidates[i]) <= task.beyond[query]) candidates[kept++] = candidates[i];
    task.scores.count[query] = kept;
    if (kept + kLanes <= room) return;
    task.scores.count[query] = kGivenUp;
    task.beyond[query] = -1.0f;
}

// What a pass of scores does with its sums: the shifted scores, which are not negative, take the place of distances.
template <class M>
HT_INLINE void offer_sums(const Score<M>& kind, const DistanceTask& task, Lanes sum, size_t query, size_t panel) {
    const Lanes score = maximum(add(kind.score(task, sum, panel), fill(task.scores.shift[query])), fill(0.0f));
    const size_t left = task.rows - panel * kLanes;
    uint32_t open = ~bits(less(fill(task.beyond[query]), score)) & (left < kLanes ? (1u << left) - 1 : kAllLanes);
    if (open == 0) return;
    if (task.scores.count[query] + kLanes > candidate_room(task.k)) {
        drop_candidates(task, query);
        if (task.scores.count[query] == kGivenUp) return;
    }
    float values[kLanes];
    store(values, score);
    SmallestK& smallest = task.smallest[query];
    uint64_t* candidates = task.scores.candidates + query * candidate_room(task.k);
    uint32_t count = task.scores.count[query];
    for (; open != 0; open &= open - 1) {
        const uint32_t lane = static_cast<uint32_t>(__builtin_ctz(open));
        const uint64_t key = key_of(values[lane], static_cast<uint32_t>(panel * kLanes) + lane);
        candidates[count++] = key;
        offer(smallest, key);
    }
    task.scores.count[query] = count;
    if (is_full(smallest)) task.beyond[query] = bound_of(smallest) + 2.0f * task.scores.margin[query];
}

typedef float Four __attribute__((vector_size(16), aligned(4)));

// Four of the eight numbers of a and b. GCC knows clang's name for it from version 12 on.
#if defined(__clang__)
#define HT_PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t FourPlaces __attribute__((vector_size(16)));
#define HT_PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, FourPlaces{i, j, k, l})
#endif

// Sixteen rows side by side: [features][kLanes].
inline void interleave_rows(const float* const* rows, size_t features, float* panel) {
    const size_t whole = features - features % 4;
    for (size_t d = 0; d < whole; d += 4) {
        for (size_t lane = 0; lane < kLanes; lane += 4) {
            const auto row = [&](size_t i) { return *reinterpret_cast<const Four*>(rows[lane + i] + d); };
            const auto put = [&](size_t i, Four v) { *reinterpret_cast<Four*>(panel + (d + i) * kLanes + lane) = v; };
            const Four low01 = HT_PICK(row(0), row(1), 0, 4, 1, 5), high01 = HT_PICK(row(0), row(1), 2, 6, 3, 7);
            const Four low23 = HT_PICK(row(2), row(3), 0, 4, 1, 5), high23 = HT_PICK(row(2), row(3), 2, 6, 3, 7);
            put(0, HT_PICK(low01, low23, 0, 1, 4, 5));
            put(1, HT_PICK(low01, low23, 2, 3, 6, 7));
            put(2, HT_PICK(high01, high23, 0, 1, 4, 5));
            put(3, HT_PICK(high01, high23, 2, 3, 6, 7));
        }
    }
    for (size_t d = whole; d < features; ++d)
        for (size_t lane = 0; lane < kLanes; ++lane) panel[d * kLanes + lane] = rows[lane][d];
}

#undef HT_PICK

// The k nearest of the candidates, by their distances.
template <class M>
void take_nearest(const M& metric, const DistanceTask& task, size_t query) {
    const size_t features = task.features;
    const float* row_of_query = task.queries + query * task.query_stride;
    for (size_t d = 0; d < features; ++d) task.scores.query[d] = row_of_query[task.order[d]];
    const float limit = task.beyond[query];
    const uint64_t* candidates = task.scores.candidates + query * candidate_room(task.k);
    start_query(task, query);
    SmallestK& smallest = task.smallest[query];
    for (uint32_t next = 0; next < task.scores.count[query];) {
        uint32_t numbers[kLanes];
        const float* rows[kLanes];
        float norms[kLanes], distances[kLanes];
        size_t count = 0;
        for (; count < kLanes && next < task.scores.count[query]; ++next)
            if (distance_of(candidates[next]) <= limit) numbers[count++] = row_of(candidates[next]);
        if (count == 0) break;
        for (size_t lane = 0; lane < kLanes; ++lane) {
            const uint32_t number = numbers[lane < count ? lane : 0];
            rows[lane] = task.by_row + number * features;
            norms[lane] = task.norms[number];
        }
        interleave_rows(rows, features, task.scores.panel);
        const Lanes inverse_norms = M::kCosine ? inverse_norms_of(norms) : fill(1.0f);
        Lanes sum = fill(0.0f);
        tile_sums<1, 1, M::kCosine>(metric, task.scores.query, task.scores.panel, &inverse_norms, features, 0, features,
                                    &sum);
        store(distances, panel_distances(metric, task, sum, query, task.scores.panel, norms));
        for (size_t lane = 0; lane < count; ++lane) offer(smallest, key_of(distances[lane], numbers[lane]));
    }
}

// Sets up the scores of a query; false where its range or the group's does not allow them.
template <class M>
bool start_scores(const DistanceTask& task, size_t query, float largest_norm) {
    if (M::kCosine && !task.nonzero[query]) return false;
    const float* row = task.queries + query * task.query_stride;
    const size_t whole = task.features - task.features % kLanes;
    const Lanes rest = load_part(row + whole, task.features - whole, 0.0f);
    Lanes sums = rest, squares = mul(rest, rest);
    for (size_t d = 0; d < whole; d += kLanes) {
        const Lanes value = load(row + d);
        sums = add(sums, value);
        squares = fma(value, value, squares);
    }
    const float features = static_cast<float>(task.features), square = sum_lanes(squares);
    // Rounding takes less than this from the norm.
    const float reach = __builtin_sqrtf(square) * 1.01f + largest_norm;
    if (!(reach > kSmallestReach && reach < kLargestReach)) return false;
    const float scale = Score<M>::scale(reach, features);
    const float terms = (features < kFeatureBlock ? features : kFeatureBlock) + features / kFeatureBlock;
    task.scores.margin[query] = 2.0f * (terms + 16.0f) * 0x1p-24f * scale;
    // Large enough that no score is below 0: the sums above may have lost a thousandth.
    task.scores.shift[query] = Score<M>::shift(sum_lanes(sums), square) + 0x1p-10f * scale;
    task.scores.count[query] = 0;
    start_query(task, query);
    return true;
}

// Finds the k nearest rows of those queries where scores can be had and tell rows apart. They go to the end of the
// list; returns how many are left before them, to be computed in full.
template <class M>
size_t preselect(const M& metric, const DistanceTask& task, uint32_t* queries, size_t count) {
    if constexpr (Score<M>::kExists) {
        if (task.by_row == nullptr || task.every_row || !can_preselect(count, task.rows, task.k)) return count;
        float largest_norm = 0.0f;
        uint32_t unusual = 0;
        for (size_t panel = 0; panel < panels_of(task.rows); ++panel) {
            const float norm = max_lanes(load(task.norms + panel * kLanes));
            largest_norm = norm > largest_norm ? norm : largest_norm;
            unusual |= lanes_of<M>(task, panel).unusual;
        }
        if (unusual != 0) return count;
        size_t left = 0;
        const auto leave = [&](size_t i) {
            const uint32_t query = queries[i];
            queries[i] = queries[left];
            queries[left++] = query;
        };
        for (size_t i = 0; i < count; ++i)
            if (!start_scores<M>(task, queries[i], largest_norm)) leave(i);
        run_pass(Score<M>{}, task, {queries + left, count - left, 0, task.features});
        for (size_t i = left; i < count; ++i) {
            if (task.scores.count[queries[i]] == kGivenUp) {
                leave(i);
            } else {
                take_nearest(metric, task, queries[i]);
            }
        }
        *task.scores.decided += count - left;
        return left;
    } else {
        return count;
    }
}

}  // namespace honeytrace::HONEYTRACE_LEVEL
