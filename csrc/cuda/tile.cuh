// feature_distance for many queries: 64 queries by 64 rows a tile, sums in registers.
//
// Queries and rows come feature-major (panels of 16), so a chunk of 16 features is copied to shared memory 16 bytes at
// a time and read from there 16 bytes at a time: three loads for the 32 pairs that a thread has. While one chunk is
// worked on the next is under way. After each slice of 64 features the tile stops if every pair has passed its bound.
// Then the distances go through shared memory to the warps, each of which keeps the k nearest of its 16 queries.
#pragma once

#include "cuda/problem.h"

namespace honeytrace::device {

constexpr int kTile = 64;
constexpr int kChunk = 16;
constexpr int kQueriesOfThread = 8, kRowsOfThread = 4;
constexpr int kRowThreads = kTile / kRowsOfThread;
static_assert(kRowThreads * (kTile / kQueriesOfThread) == kThreads);
static_assert(kSlice % kChunk == 0);

struct TileMemory {
    union {
        struct {
            float queries[2][kChunk][kTile];
            float rows[2][kChunk][kTile];
        } chunk;
        float distance[kTile][kTile];
    };
    uint64_t keys[kTile][kMostKept];
    float exit_sum[kTile];
    uint8_t by_limit[kTile], skipped[kTile];
};

// Several features at a time where one is few instructions.
template <class M>
constexpr int kUnrolled = 8;
template <>
constexpr int kUnrolled<LpHalves> = 1;
template <>
constexpr int kUnrolled<LpAny> = 1;

// Blocks that a multiprocessor must hold, which bounds the registers: 128 of a thread for 4 blocks, 168 for 3, where
// 128 would not do without spills.
template <class M>
constexpr int kTileBlocks = 4;
template <>
constexpr int kTileBlocks<LpAny> = 3;

struct TileView {
    const int32_t* order;          // of the group
    const float* queries;          // its first panel
    const float* rows;             // its first panel
    int query_panels, row_panels;  // that exist, at most 4
    int valid_rows;                // of the tile
};

// One chunk of both operands, the features `first` .. of the order; zeros beyond the last panel and the last feature. A
// thread copies the same 16 bytes of a panel's feature from every other panel.
HT_DEVICE void copy_chunk(const TileView& view, TileMemory& memory, int stage, int features, int first) {
    constexpr int kPieces = kChunk * kPanel / 4, kStep = kThreads / kPieces;
    static_assert(kStep == 2);
    const int panel = thread_index() / kPieces;
    const int d = thread_index() % kPieces / (kPanel / 4), lane = thread_index() % (kPanel / 4) * 4;
    const bool inside = first + d < features;
    const int from = (panel * features + (inside ? view.order[first + d] : 0)) * kPanel + lane;
    float* queries = &memory.chunk.queries[stage][d][panel * kPanel + lane];
    float* rows = &memory.chunk.rows[stage][d][panel * kPanel + lane];
    HT_UNROLL(2) for (int turn = 0; turn < kTile / kPanel / kStep; ++turn) {
        const bool of_queries = inside && panel + turn * kStep < view.query_panels;
        const bool of_rows = inside && panel + turn * kStep < view.row_panels;
        const int there = from + turn * kStep * features * kPanel;
        copy_async(queries + turn * kStep * kPanel, of_queries ? view.queries + there : view.queries, of_queries);
        copy_async(rows + turn * kStep * kPanel, of_rows ? view.rows + there : view.rows, of_rows);
    }
}

// Sums of the tile. False: every pair has passed its bound before the end, the sums are incomplete. The block is in
// step again when it returns.
template <class M>
HT_DEVICE bool tile_sums(const M& metric, const DistanceProblem& problem, const TileView& view, TileMemory& memory,
                         const float (&inverse)[kRowsOfThread], float (&total)[kQueriesOfThread][kRowsOfThread]) {
    const int first_query = thread_index() / kRowThreads * kQueriesOfThread;
    const int first_row = thread_index() % kRowThreads * kRowsOfThread;
    const int chunks = (problem.features + kChunk - 1) / kChunk;
    float part[kQueriesOfThread][kRowsOfThread];
    HT_UNROLL(8) for (int q = 0; q < kQueriesOfThread; ++q) {
        HT_UNROLL(4) for (int r = 0; r < kRowsOfThread; ++r)
            total[q][r] = part[q][r] = 0.0f;
    }
    copy_chunk(view, memory, 0, problem.features, 0);
    commit_copies();
    for (int c = 0; c < chunks; ++c) {
        const int stage = c % 2;
        if (c + 1 < chunks) copy_chunk(view, memory, 1 - stage, problem.features, (c + 1) * kChunk);
        commit_copies();
        wait_copies<1>();
        sync_block();
        HT_UNROLL_BY(kUnrolled<M>)
        for (int d = 0; d < kChunk; ++d) {
            const Float4 low = load4(&memory.chunk.queries[stage][d][first_query]);
            const Float4 high = load4(&memory.chunk.queries[stage][d][first_query + 4]);
            const Float4 four = load4(&memory.chunk.rows[stage][d][first_row]);
            const float query[kQueriesOfThread] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            float row[kRowsOfThread] = {four.x, four.y, four.z, four.w};
            if constexpr (M::kCosine) {
                HT_UNROLL(4) for (int r = 0; r < kRowsOfThread; ++r)
                    row[r] *= inverse[r];
            }
            HT_UNROLL(8) for (int q = 0; q < kQueriesOfThread; ++q) {
                HT_UNROLL(4) for (int r = 0; r < kRowsOfThread; ++r)
                    part[q][r] = metric.accumulate(Scalar(query[q]), Scalar(row[r]), Scalar(part[q][r])).value;
            }
        }
        const bool last = c + 1 == chunks;
        if (!last && (c + 1) % (kSlice / kChunk) != 0) {
            sync_block();  // before the next chunk but one overwrites this one
            continue;
        }
        bool passed = !last;
        HT_UNROLL(8) for (int q = 0; q < kQueriesOfThread; ++q) {
            const float bound = memory.exit_sum[first_query + q];
            HT_UNROLL(4) for (int r = 0; r < kRowsOfThread; ++r) {
                total[q][r] += part[q][r];
                part[q][r] = 0.0f;
                passed = passed && (total[q][r] >= bound || first_row + r >= view.valid_rows);
            }
        }
        if (sync_block_and(passed)) {
            wait_copies<0>();
            sync_block();  // no copy may land in what the next tile puts there
            return false;
        }
    }
    wait_copies<0>();
    return true;
}

// Distances of the tile into shared memory, those of extraordinary pairs by a second look at their features.
template <class M>
HT_DEVICE void tile_distances(const M& metric, const DistanceProblem& problem, const TileView& view, TileMemory& memory,
                              int tile_query, const float (&inverse)[kRowsOfThread],
                              const float (&total)[kQueriesOfThread][kRowsOfThread]) {
    const int first_query = thread_index() / kRowThreads * kQueriesOfThread;
    const int first_row = thread_index() % kRowThreads * kRowsOfThread;
    bool strange = false;
    HT_UNROLL(8) for (int q = 0; q < kQueriesOfThread; ++q) {
        bool nonzero = true;
        if constexpr (M::kCosine) {
            const int query = tile_query + first_query + q;
            nonzero = query < problem.batch && (problem.state[query] & kNonzero) != 0;
        }
        float found[kRowsOfThread];
        HT_UNROLL(4) for (int r = 0; r < kRowsOfThread; ++r) {
            found[r] = distance_of_sum(metric, total[q][r], inverse[r], nonzero, problem.features);
            strange = strange || (found[r] == kAgain && first_row + r < view.valid_rows);
        }
        store4(&memory.distance[first_query + q][first_row], {found[0], found[1], found[2], found[3]});
    }
    if (!sync_block_or(strange)) return;
    HT_UNROLL_BY(1)
    for (int pair = thread_index(); pair < kTile * kTile; pair += kThreads) {
        const int q = pair / kTile, r = pair % kTile;
        if (memory.distance[q][r] != kAgain || tile_query + q >= problem.batch || r >= view.valid_rows) continue;
        const float* query = view.queries + static_cast<int64_t>(q / kPanel) * problem.features * kPanel + q % kPanel;
        const float* row = view.rows + static_cast<int64_t>(r / kPanel) * problem.features * kPanel + r % kPanel;
        memory.distance[q][r] = again(metric, query, row, problem.features);
    }
    sync_block();
}

// Each warp offers the tile's rows to its 16 queries and renews their exit bounds.
template <class M>
HT_DEVICE void tile_select(const M& metric, const DistanceProblem& problem, const TileView& view, TileMemory& memory,
                           int tile_query, int group, int tile_row) {
    const int lane = lane_index();
    HT_UNROLL_BY(1)
    for (int q = warp_index(); q < kTile && tile_query + q < problem.batch; q += kWarps) {
        const int query = tile_query + q;
        uint64_t mine = memory.keys[q][lane];
        const uint64_t above = problem.done > 0 ? problem.above[problem.flat(query, group)] : 0;
        HT_UNROLL_BY(1)
        for (int r = lane; r < kTile; r += kWarpLanes) {
            uint64_t key = kNoKey;
            if (r < view.valid_rows) {
                key = key_of(memory.distance[q][r], static_cast<uint32_t>(tile_row + r));
                if (problem.done > 0 && key <= above) key = kNoKey;
            }
            mine = offer_keys(mine, problem.kept, key);
        }
        memory.keys[q][lane] = mine;
        const uint64_t best = shuffle(mine, 0), worst = shuffle(mine, problem.kept - 1);
        if (lane == 0 && (problem.state[query] & kFinite) != 0) {
            const Exit exit = exit_of(metric, problem, query, group, best, worst);
            memory.exit_sum[q] = exit.sum;
            memory.by_limit[q] = exit.by_limit;
        }
    }
}

// Grid: tiles of queries, parts of the bank, groups.
template <class M>
HT_KERNEL(kThreads, kTileBlocks<M>)
tile_kernel(M metric, DistanceProblem problem) {
    TileMemory& memory = *reinterpret_cast<TileMemory*>(shared_memory());
    const int tile_query = block_x() * kTile, part = block_y(), group = block_z();
    const int panel_end = min_of((part + 1) * problem.part_panels, problem.panels());
    TileView view{};
    view.order = problem.group_order(group);
    view.queries = problem.query_panel(tile_query / kPanel);
    view.query_panels = min_of(kTile / kPanel, (problem.batch - tile_query + kPanel - 1) / kPanel);

    for (int i = thread_index(); i < kTile * kMostKept; i += kThreads)
        memory.keys[i / kMostKept][i % kMostKept] = kNoKey;
    if (thread_index() < kTile) {
        const int q = thread_index(), query = tile_query + q;
        // Rows cannot matter to a query that is not there or not finite.
        Exit exit{0.0f, false};
        if (query < problem.batch && (problem.state[query] & kFinite) != 0)
            exit = exit_of(metric, problem, query, group, kNoKey, kNoKey);
        memory.exit_sum[q] = exit.sum;
        memory.by_limit[q] = exit.by_limit;
        memory.skipped[q] = 0;
    }
    sync_block();

    for (int panel = part * problem.part_panels; panel < panel_end; panel += kTile / kPanel) {
        view.rows = problem.bank_panel(group, panel);
        view.row_panels = min_of(kTile / kPanel, panel_end - panel);
        view.valid_rows = min_of(view.row_panels * kPanel, problem.rows - panel * kPanel);
        float inverse[kRowsOfThread] = {1.0f, 1.0f, 1.0f, 1.0f};
        if constexpr (M::kCosine) {
            const int first_row = thread_index() % kRowThreads * kRowsOfThread;
            HT_UNROLL(4) for (int r = 0; r < kRowsOfThread; ++r) {
                if (first_row + r < view.valid_rows)
                    inverse[r] = inverse_norm(problem.group_norms(group)[panel * kPanel + first_row + r]);
            }
        }
        float total[kQueriesOfThread][kRowsOfThread];
        if (tile_sums(metric, problem, view, memory, inverse, total)) {
            // All threads are past the last chunk, whose place the distances take, and behind them past those.
            tile_distances(metric, problem, view, memory, tile_query, inverse, total);
            tile_select(metric, problem, view, memory, tile_query, group, panel * kPanel);
        } else if (thread_index() < kTile) {
            memory.skipped[thread_index()] |= memory.by_limit[thread_index()] ? kLeftOut | kStopped : kStopped;
        }
        sync_block();
    }

    for (int i = thread_index(); i < kTile * problem.kept; i += kThreads) {
        const int q = i / problem.kept, slot = i % problem.kept;
        if (tile_query + q < problem.batch) problem.keys_of(tile_query + q, group, part)[slot] = memory.keys[q][slot];
    }
    if (thread_index() < kTile && tile_query + thread_index() < problem.batch)
        problem.skipped[problem.flat(tile_query + thread_index(), group) * problem.parts + part] =
            memory.skipped[thread_index()];
}

}  // namespace honeytrace::device
