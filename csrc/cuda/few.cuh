// feature_distance for few queries, where reading the bank is the limit: four queries at a time, a warp for each panel
// of 16 rows, its lanes on 4 rows by 8 slices of the features. And the second step of every selection: joining parts.
#pragma once

#include "cuda/problem.h"

namespace honeytrace::device {

constexpr int kQuad = 4;
constexpr int kSlices = 8;
static_assert(kSlices * (kPanel / kQuad) == kWarpLanes);

struct FewMemory {
    uint64_t keys[kWarps][kQuad][kMostKept];
    float distance[kWarps][kQuad][kPanel];
    float exit_sum[kWarps][kQuad];
    uint8_t by_limit[kWarps][kQuad], skipped[kWarps][kQuad];
};

// Sums of 4 queries and one panel: total[q][r] for row 4 * (lane % 4) + r, the same in all slices. False: all have
// passed their bounds.
template <class M>
HT_DEVICE bool few_sums(const M& metric, const DistanceProblem& problem, const float* queries, const float* rows,
                        const int32_t* order, int valid_rows, const float* exit_sum, const float (&inverse)[kQuad],
                        float (&total)[kQuad][kQuad]) {
    const int first_row = lane_index() % kQuad * kQuad, slice = lane_index() / kQuad;
    HT_UNROLL(4) for (int q = 0; q < kQuad; ++q) {
        HT_UNROLL(4) for (int r = 0; r < kQuad; ++r)
            total[q][r] = 0.0f;
    }
    HT_UNROLL_BY(1)
    for (int base = 0; base < problem.features; base += kSlice * kSlices) {
        const int begin = base + slice * kSlice, end = min_of(begin + kSlice, problem.features);
        float part[kQuad][kQuad];
        HT_UNROLL(4) for (int q = 0; q < kQuad; ++q) {
            HT_UNROLL(4) for (int r = 0; r < kQuad; ++r)
                part[q][r] = 0.0f;
        }
        HT_UNROLL_BY(4)
        for (int d = begin; d < end; ++d) {
            const int64_t feature = int64_t{order[d]} * kPanel;
            const Float4 of_queries = load4(queries + feature);
            const Float4 of_rows = load4(rows + feature + first_row);
            const float query[kQuad] = {of_queries.x, of_queries.y, of_queries.z, of_queries.w};
            float row[kQuad] = {of_rows.x, of_rows.y, of_rows.z, of_rows.w};
            if constexpr (M::kCosine) {
                HT_UNROLL(4) for (int r = 0; r < kQuad; ++r)
                    row[r] *= inverse[r];
            }
            HT_UNROLL(4) for (int q = 0; q < kQuad; ++q) {
                HT_UNROLL(4) for (int r = 0; r < kQuad; ++r)
                    part[q][r] = metric.accumulate(Scalar(query[q]), Scalar(row[r]), Scalar(part[q][r])).value;
            }
        }
        HT_UNROLL_BY(1)
        for (int s = 0; s < kSlices; ++s) {
            const int from = s * kQuad + lane_index() % kQuad;
            HT_UNROLL(4) for (int q = 0; q < kQuad; ++q) {
                HT_UNROLL(4) for (int r = 0; r < kQuad; ++r)
                    total[q][r] += shuffle(part[q][r], from);
            }
        }
        if (base + kSlice * kSlices >= problem.features) break;
        bool passed = true;
        HT_UNROLL(4) for (int q = 0; q < kQuad; ++q) {
            HT_UNROLL(4) for (int r = 0; r < kQuad; ++r)
                passed = passed && (total[q][r] >= exit_sum[q] || first_row + r >= valid_rows);
        }
        if (ballot(passed) == ~0u) return false;
    }
    return true;
}

// Offers one panel to this warp's lists of the queries in `wanted`.
template <class M>
HT_DEVICE void few_panel(const M& metric, const DistanceProblem& problem, FewMemory& memory, int quad, int group,
                         int panel, uint32_t wanted) {
    const int lane = lane_index(), warp = warp_index();
    const int first_row = lane % kQuad * kQuad, slice = lane / kQuad;
    const int valid_rows = min_of(kPanel, problem.rows - panel * kPanel);
    const float* queries = problem.query_panel(quad * kQuad / kPanel) + quad * kQuad % kPanel;
    const float* rows = problem.bank_panel(group, panel);
    float inverse[kQuad] = {1.0f, 1.0f, 1.0f, 1.0f};
    if constexpr (M::kCosine) {
        HT_UNROLL(4) for (int r = 0; r < kQuad; ++r)
            inverse[r] = inverse_norm(problem.group_norms(group)[panel * kPanel + first_row + r]);
    }
    float total[kQuad][kQuad];
    if (!few_sums(metric, problem, queries, rows, problem.group_order(group), valid_rows, memory.exit_sum[warp],
                  inverse, total)) {
        if (lane < kQuad) memory.skipped[warp][lane] |= memory.by_limit[warp][lane] ? kLeftOut | kStopped : kStopped;
        sync_warp();
        return;
    }
    // Slice s finishes query s % 4: each pair once or twice, by neighbouring lanes alike.
    const int mine = slice % kQuad, query = quad * kQuad + mine;
    const bool nonzero = query < problem.batch && (problem.state[query] & kNonzero) != 0;
    HT_UNROLL(4) for (int r = 0; r < kQuad; ++r) {
        float sum = total[0][r];
        HT_UNROLL(3) for (int q = 1; q < kQuad; ++q)
            sum = mine == q ? total[q][r] : sum;
        float distance = distance_of_sum(metric, sum, inverse[r], nonzero, problem.features);
        if (distance == kAgain) distance = again(metric, queries + mine, rows + first_row + r, problem.features);
        if (slice < kQuad) memory.distance[warp][mine][first_row + r] = distance;
    }
    sync_warp();
    HT_UNROLL_BY(1)
    for (int q = 0; q < kQuad; ++q) {
        if ((wanted >> q & 1u) == 0) continue;
        const int of_quad = quad * kQuad + q;
        uint64_t kept = memory.keys[warp][q][lane], key = kNoKey;
        if (lane < valid_rows) {
            key = key_of(memory.distance[warp][q][lane], static_cast<uint32_t>(panel * kPanel + lane));
            if (problem.done > 0 && key <= problem.above[problem.flat(of_quad, group)]) key = kNoKey;
        }
        kept = offer_keys(kept, problem.kept, key);
        memory.keys[warp][q][lane] = kept;
        const uint64_t best = shuffle(kept, 0), worst = shuffle(kept, problem.kept - 1);
        if (lane == 0) {
            const Exit exit = exit_of(metric, problem, of_quad, group, best, worst);
            memory.exit_sum[warp][q] = exit.sum;
            memory.by_limit[warp][q] = exit.by_limit;
        }
    }
    sync_warp();
}

// The queries of a quad that are there and finite.
HT_DEVICE uint32_t usable_queries(const DistanceProblem& problem, int quad) {
    uint32_t word = 0;
    for (int q = 0; q < kQuad; ++q) {
        const int query = quad * kQuad + q;
        if (query < problem.batch && (problem.state[query] & kFinite) != 0) word |= 1u << q;
    }
    return word;
}

// The k nearest of the panels [begin, end) for the queries in `wanted`, by all warps of the block. Afterwards warp w
// holds the keys of query w of the quad, and in *skipped what was left out for it.
template <class M>
HT_DEVICE uint64_t few_nearest(const M& metric, const DistanceProblem& problem, FewMemory& memory, int quad, int group,
                               int begin, int end, uint32_t wanted, uint8_t* skipped) {
    const int lane = lane_index(), warp = warp_index();
    for (int q = 0; q < kQuad; ++q) memory.keys[warp][q][lane] = kNoKey;
    if (lane < kQuad) {
        Exit exit{0.0f, false};
        if ((wanted >> lane & 1u) != 0) exit = exit_of(metric, problem, quad * kQuad + lane, group, kNoKey, kNoKey);
        memory.exit_sum[warp][lane] = exit.sum;
        memory.by_limit[warp][lane] = exit.by_limit;
        memory.skipped[warp][lane] = 0;
    }
    sync_warp();
    HT_UNROLL_BY(1)
    for (int panel = begin + warp; panel < end; panel += kWarps)
        few_panel(metric, problem, memory, quad, group, panel, wanted);
    sync_block();
    uint64_t mine = memory.keys[0][warp][lane];
    *skipped = memory.skipped[0][warp];
    for (int other = 1; other < kWarps; ++other) {
        mine = offer_keys(mine, problem.kept, memory.keys[other][warp][lane]);
        *skipped |= memory.skipped[other][warp];
    }
    return mine;
}

// Grid: quads of queries, parts of the bank, groups.
template <class M>
HT_KERNEL(kThreads, 4)
few_kernel(M metric, DistanceProblem problem) {
    FewMemory& memory = *reinterpret_cast<FewMemory*>(shared_memory());
    const int quad = block_x(), part = block_y(), group = block_z();
    const int begin = part * problem.part_panels, end = min_of(begin + problem.part_panels, problem.panels());
    uint8_t skipped = 0;
    const uint64_t mine =
        few_nearest(metric, problem, memory, quad, group, begin, end, usable_queries(problem, quad), &skipped);
    const int query = quad * kQuad + warp_index();
    if (query >= problem.batch) return;
    if (lane_index() < problem.kept) problem.keys_of(query, group, part)[lane_index()] = mine;
    if (lane_index() == 0) problem.skipped[problem.flat(query, group) * problem.parts + part] = skipped;
}

// What the keys say of a query whose rows beyond `limit` were left out.
enum class Verdict { kExact, kFar, kUnknown };

HT_DEVICE Verdict judge(const DistanceProblem& problem, int query, int group, uint64_t mine) {
    const float limit = limit_of(problem.far, query, group);
    // Every row that was left out is at least at the limit, so those before it are exactly the nearest ones.
    const bool near = lane_index() < problem.kept && mine != kNoKey && distance_of(mine) < limit;
    const int count = count_bits(ballot(near));
    if (count == problem.kept) return Verdict::kExact;
    float sum = add_distances(mine, count, 0.0f);
    for (int i = count; i < problem.kept; ++i) sum += limit;
    const float mean = sum / static_cast<float>(problem.kept);
    // Both means round, by less than a unit for each of their k additions.
    const float least = mean - mean * static_cast<float>(problem.kept + 4) * 0x1p-23f;
    return is_far(problem.far, query, group, least) ? Verdict::kFar : Verdict::kUnknown;
}

// A warp writes what it found for one query and group, on top of the passes before.
HT_DEVICE void emit(const DistanceProblem& problem, int query, int group, uint64_t mine, bool finite) {
    const int64_t flat = problem.flat(query, group);
    const int lane = lane_index();
    float sum = problem.done > 0 ? problem.distance[flat] : 0.0f;
    sync_warp();  // all lanes have read it
    sum = add_distances(mine, problem.kept, sum);
    if (problem.index != nullptr && lane < problem.kept) {
        const int found = finite ? static_cast<int>(row_of(mine)) : problem.done + lane;
        problem.index[flat * problem.k + problem.done + lane] = found;
    }
    const uint64_t last = shuffle(mine, problem.kept - 1);
    if (lane != 0) return;
    problem.above[flat] = last;
    if (problem.done + problem.kept < problem.k) {
        problem.distance[flat] = sum;
    } else {
        problem.distance[flat] = finite ? sum / static_cast<float>(problem.k) : __builtin_inff();
    }
}

// Joins the parts of a quad of queries, a warp for each; where the limits left a mean open, the block goes through the
// group again without them. Grid: quads of queries, groups.
template <class M>
HT_KERNEL(kThreads, 3)
merge_kernel(M metric, DistanceProblem problem) {
    FewMemory& memory = *reinterpret_cast<FewMemory*>(shared_memory());
    const int quad = block_x(), group = block_y(), lane = lane_index();
    const int query = quad * kQuad + warp_index();
    const bool there = query < problem.batch;
    const bool finite = there && (problem.state[query] & kFinite) != 0;
    uint64_t mine = kNoKey;
    bool skipped = false;
    if (there) {
        const uint8_t* of_parts = problem.skipped + problem.flat(query, group) * problem.parts;
        for (int part = 0; part < problem.parts; ++part) {
            const uint64_t key = lane < problem.kept ? problem.keys_of(query, group, part)[lane] : kNoKey;
            mine = offer_keys(mine, problem.kept, key);
            skipped = skipped || (of_parts[part] & kLeftOut) != 0;
        }
    }
    Verdict verdict = Verdict::kExact;
    if (finite && skipped) verdict = judge(problem, query, group, mine);
    const bool open = verdict == Verdict::kUnknown;
    if (there && lane == 0) problem.exhaustive[problem.flat(query, group)] = open;
    if (sync_block_or(open)) {
        uint8_t* of_warps = &memory.skipped[0][0];
        if (lane == 0) of_warps[warp_index()] = open;
        sync_block();
        uint32_t wanted = 0;
        for (int q = 0; q < kQuad; ++q) wanted |= static_cast<uint32_t>(of_warps[q] != 0) << q;
        sync_block();
        DistanceProblem whole = problem;
        whole.far.offset = nullptr;
        uint8_t none = 0;
        const uint64_t found = few_nearest(metric, whole, memory, quad, group, 0, problem.panels(), wanted, &none);
        if (open) mine = found;
    }
    if (!there) return;
    if (verdict == Verdict::kFar) {
        if (lane == 0) problem.distance[problem.flat(query, group)] = __builtin_inff();
        return;
    }
    emit(problem, query, group, mine, finite);
}

}  // namespace honeytrace::device
