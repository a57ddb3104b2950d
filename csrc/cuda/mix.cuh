// watermark_mix: a block for each answer, which finds the strongest group, decides and mixes (core/mixing.h).
//
// Shaping, weight and flip are double, by one thread; the classes are float32, eight at a time for each thread.
#pragma once

#include "cuda/rows.cuh"

namespace honeytrace::device {

struct MixMemory {
    float of_warp[kWarps];
    uint64_t keys[kWarps];
    // the decision
    int group;
    float strongest, weight, log_keep;
    double shift;
    bool flipped;
};

HT_DEVICE float block_largest(MixMemory& memory, float value) {
    value = largest_of_lanes(value, kWarpLanes);
    if (lane_index() == 0) memory.of_warp[warp_index()] = value;
    sync_block();
    for (int warp = 0; warp < kWarps; ++warp) value = fmaxf(value, memory.of_warp[warp]);
    sync_block();
    return value;
}

HT_DEVICE float block_sum(MixMemory& memory, float value) {
    value = sum_of_lanes(value, kWarpLanes);
    if (lane_index() == 0) memory.of_warp[warp_index()] = value;
    sync_block();
    value = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) value += memory.of_warp[warp];
    sync_block();
    return value;
}

HT_DEVICE uint64_t block_largest_key(MixMemory& memory, uint64_t key) {
    for (int step = kWarpLanes / 2; step > 0; step /= 2) {
        const uint64_t other = shuffle(key, lane_index() ^ step);
        key = other > key ? other : key;
    }
    if (lane_index() == 0) memory.keys[warp_index()] = key;
    sync_block();
    for (int warp = 0; warp < kWarps; ++warp) key = memory.keys[warp] > key ? memory.keys[warp] : key;
    sync_block();
    return key;
}

// Largest value, and the sum of exp(value - largest); -infinity and 0 do not occur, a row has a class at least.
struct LogSum {
    float top, sum;
    bool finite;
    HT_DEVICE double value() const { return top + log(static_cast<double>(sum)); }
};

HT_DEVICE LogSum log_sum(const RowsView& view, const char* row, MixMemory& memory, bool with_sum) {
    LogSum out{-kLargestFloat32, 1.0f, true};
    bool finite = true;
    float x[kRun];
    HT_UNROLL_BY(1)
    for (int c = thread_index() * kRun; c < view.columns; c += kThreads * kRun) {
        load_run(view, row, c, -kLargestFloat32, x);
        finite = finite && all_finite(x);
        HT_UNROLL(8) for (int i = 0; i < kRun; ++i)
            out.top = fmaxf(out.top, x[i]);
    }
    out.top = block_largest(memory, out.top);
    out.finite = sync_block_and(finite);
    if (!with_sum || !out.finite) return out;
    float sum = 0.0f;
    HT_UNROLL_BY(1)
    for (int c = thread_index() * kRun; c < view.columns; c += kThreads * kRun) {
        load_run(view, row, c, -__builtin_inff(), x);
        HT_UNROLL(8) for (int i = 0; i < kRun; ++i)
            sum += exp_negative(Scalar(x[i] - out.top)).value;
    }
    out.sum = block_sum(memory, sum);
    return out;
}

// The strongest group and its similarity as one key: first maximum wins, NaN and what is negative count as 0.
HT_DEVICE uint64_t strongest(const MixTask& task, MixMemory& memory, int row, bool usable, float confidence) {
    uint64_t best = 0;
    HT_UNROLL_BY(1)
    for (int g = thread_index(); g < task.groups; g += kThreads) {
        const int64_t flat = static_cast<int64_t>(row) * task.groups + g;
        float s = task.source[flat];
        if (task.far.offset != nullptr) {
            s = usable ? similarity_of(s, confidence, task.far.offset[g], task.far.scale[g], task.far.confidence_weight)
                       : 0.0f;
            task.similarity[flat] = s;
        }
        if (!(s > 0.0f)) s = 0.0f;
        const uint64_t key = key_of(s, ~static_cast<uint32_t>(g));
        best = key > best ? key : best;
    }
    return block_largest_key(memory, best);
}

HT_DEVICE void decide_row(const MixTask& task, MixMemory& memory, int row, uint64_t key, float confidence,
                          double logit_lse) {
    memory.group = static_cast<int>(~row_of(key));
    memory.strongest = fminf(distance_of(key), 1.0f);
    memory.flipped = false;
    if (memory.strongest == 0.0f) return;
    const Decision decision = decide(task.rule, memory.strongest, confidence, task.seed,
                                     static_cast<uint64_t>(task.bucket[row]), static_cast<uint32_t>(memory.group));
    memory.flipped = decision.flipped;
    memory.weight = static_cast<float>(decision.weight);
    if (task.rule.space == 0) return;
    memory.log_keep = static_cast<float>(log(1.0 - decision.weight));
    memory.shift = logit_lse + log(decision.weight);
}

// log(exp(own) + exp(taken)); -infinity stands for a share of nothing.
HT_DEVICE float join_logs(float own, float taken) {
    const float high = fmaxf(own, taken), low = fminf(own, taken);
    if (low == -__builtin_inff()) return high;
    return high + log1p_unit(exp_negative(Scalar(low - high))).value;
}

// Writes elements column .. column + 7 that exist, rounded to the type and clamped to its finite range.
HT_DEVICE void store_run(const MixTask& task, char* row, int column, const float (&x)[kRun]) {
    const Type type = task.logits.type;
    const bool whole = task.out_aligned && column + kRun <= task.logits.columns;
    if (type == Type::kFloat32) {
        float* target = reinterpret_cast<float*>(row) + column;
        float y[kRun];
        HT_UNROLL(8) for (int i = 0; i < kRun; ++i)
            y[i] = clamp_finite(x[i], kLargestFloat32);
        if (whole) {
            store4(target, {y[0], y[1], y[2], y[3]});
            store4(target + 4, {y[4], y[5], y[6], y[7]});
            return;
        }
        HT_UNROLL(8) for (int i = 0; i < kRun; ++i)
            if (column + i < task.logits.columns) target[i] = y[i];
        return;
    }
    uint16_t* target = reinterpret_cast<uint16_t*>(row) + column;
    Words4 words{};
    HT_UNROLL(8) for (int i = 0; i < kRun; ++i) {
        const uint16_t half = type == Type::kFloat16 ? float16_from_float(x[i]) : bfloat16_from_float(x[i]);
        words.word[i / 2] |= static_cast<uint32_t>(half) << (i % 2 * 16);
    }
    if (whole) return store_words4(target, words);
    HT_UNROLL(8) for (int i = 0; i < kRun; ++i)
        if (column + i < task.logits.columns) target[i] = static_cast<uint16_t>(words.word[i / 2] >> (i % 2 * 16));
}

// The row's own bits.
HT_DEVICE void copy_row(const MixTask& task, const char* from, char* to) {
    const int bytes = task.logits.columns * size_of(task.logits.type);
    const int wide = task.logits.aligned && task.out_aligned ? bytes / 16 * 16 : 0;
    for (int i = thread_index() * 16; i < wide; i += kThreads * 16) store_words4(to + i, load_words4(from + i));
    for (int i = wide + thread_index() * 2; i < bytes; i += kThreads * 2)
        *reinterpret_cast<uint16_t*>(to + i) = *reinterpret_cast<const uint16_t*>(from + i);
}

HT_DEVICE void write_row(const MixTask& task, const MixMemory& memory, const char* from, char* to,
                         const RowsView& targets, double target_lse) {
    const char* target = targets.row(memory.group);
    const double taken_shift = memory.shift - target_lse;
    HT_UNROLL_BY(1)
    for (int c = thread_index() * kRun; c < task.logits.columns; c += kThreads * kRun) {
        float z[kRun], r[kRun];
        load_run(targets, target, c, 0.0f, r);
        if (!memory.flipped) {
            load_run(task.logits, from, c, 0.0f, z);
            HT_UNROLL(8) for (int i = 0; i < kRun; ++i)
                r[i] = task.rule.space == 0 ? mix_logit(z[i], r[i], memory.weight)
                                            : join_logs(z[i] + memory.log_keep, static_cast<float>(r[i] + taken_shift));
        }
        store_run(task, to, c, r);
    }
}

// Grid: answers.
HT_KERNEL(kThreads, 4)
mix_kernel(MixTask task) {
    MixMemory& memory = *reinterpret_cast<MixMemory*>(shared_memory());
    const int row = block_x();
    const char* from = task.logits.row(row);
    char* to =
        static_cast<char*>(task.out) + static_cast<int64_t>(row) * task.logits.columns * size_of(task.logits.type);
    const bool fused = task.far.offset != nullptr;
    const bool needs_sum = task.rule.space == 1 || task.rule.needs_confidence();
    const LogSum logits = log_sum(task.logits, from, memory, needs_sum);
    const bool usable = logits.finite && (!fused || (task.state[row] & kFinite) != 0);
    // The similarity takes the confidence that the distance kernels knew.
    const float spared = fused && task.far.confidence != nullptr ? task.far.confidence[row] : 0.0f;
    uint64_t key = strongest(task, memory, row, usable, spared);
    if (!usable) key = key_of(0.0f, ~0u);
    if (thread_index() == 0) {
        decide_row(task, memory, row, key, 1.0f / logits.sum, logits.value());
        task.group[row] = memory.group;
        task.flipped[row] = memory.flipped;
    }
    sync_block();
    if (memory.strongest == 0.0f) return copy_row(task, from, to);
    const RowsView targets{task.target_logits,  Type::kFloat32,      task.groups,
                           task.logits.columns, task.logits.columns, task.targets_aligned};
    double target_lse = 0.0;
    if (task.rule.space == 1 && !memory.flipped)
        target_lse = log_sum(targets, targets.row(memory.group), memory, true).value();
    write_row(task, memory, from, to, targets, target_lse);
}

}  // namespace honeytrace::device
