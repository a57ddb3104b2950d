#include "cpu/ops.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <numeric>
#include <type_traits>
#include <vector>

#include "core/halves.h"
#include "core/topk.h"
#include "cpu/dispatch.h"
#include "cpu/layout.h"
#include "cpu/pool.h"

namespace honeytrace {
namespace {

// Below this many multiply-adds (some ten microseconds) waking another thread costs more than it gives.
constexpr double kWorkOfThread = 256.0 * 1024.0;
constexpr size_t kMostQueries = 64;
constexpr size_t kQueryBytes = 512 * 1024;
constexpr size_t kLogitsRows = 64;

size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

RowSource slice(const RowSource& source, size_t begin, size_t rows) {
    const auto* bytes = static_cast<const char*>(source.data) + begin * source.stride * size_of(source.dtype);
    return {bytes, source.dtype, rows, source.columns, source.stride};
}

size_t useful_threads(double work, size_t threads) {
    return std::max<size_t>(1, static_cast<size_t>(std::min(static_cast<double>(threads), work / kWorkOfThread)));
}

// Queries in a block: few enough for the cache and to give every thread work, a multiple of the widest tile.
size_t block_of(size_t batch, size_t features, size_t threads) {
    size_t block = std::min(kMostQueries, std::max<size_t>(8, kQueryBytes / (features * sizeof(float)) / 8 * 8));
    const size_t share = (batch + threads - 1) / threads;
    return std::min(block, std::max<size_t>(8, (share + 7) / 8 * 8));
}

// Runs body(begin, rows) over blocks of the batch.
template <class Body>
void for_blocks(size_t batch, size_t block, size_t threads, const Body& body) {
    parallel_for((batch + block - 1) / block, threads, [&](size_t item) {
        const size_t begin = item * block;
        body(begin, std::min(block, batch - begin));
    });
}

// Memory of one block, cut into aligned pieces. It belongs to the thread and is used again by its next block.
class Scratch {
public:
    enum Use { kQueries, kAnswers };

    static Scratch& of_this_thread(Use use) {
        thread_local Scratch scratch[2];
        return scratch[use];
    }

    // Room for pieces of these sizes in bytes; their addresses follow by take().
    void reserve(std::initializer_list<size_t> pieces) {
        size_t total = 0;
        for (size_t bytes : pieces) total += round_up(bytes);
        if (total > capacity_ || capacity_ > std::max(total, kKept)) {
            memory_.reset();
            capacity_ = 0;
            memory_.reset(static_cast<char*>(::operator new(total, std::align_val_t(kAlignment))));
            capacity_ = total;
        }
        used_ = 0;
    }

    template <class T>
    T* take(size_t count) {
        T* piece = reinterpret_cast<T*>(memory_.get() + used_);
        used_ += round_up(count * sizeof(T));
        return piece;
    }

private:
    static constexpr size_t kAlignment = 64, kKept = 16 * 1024 * 1024;
    struct Free {
        void operator()(char* p) const { ::operator delete(p, std::align_val_t(kAlignment)); }
    };

    static size_t round_up(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

    std::unique_ptr<char, Free> memory_;
    size_t capacity_ = 0, used_ = 0;
};

std::atomic<uint64_t> preselected_queries{0};

// A block of queries as float32, and the scratch of the distance kernel.
struct QueryBlock {
    size_t batch, features, k;
    float* queries;
    float* unit;  // a copy that cosine may normalise
    uint8_t* finite;
    DistanceTask scratch{};

    // unit_panels: panels to be scaled at a time, for cosine only.
    // partial_rows: room for the sums that are kept between passes, 0 where nothing stops early.
    // with_scores: room for preselection.
    QueryBlock(const RowSource& source, size_t k_, size_t unit_panels, size_t partial_rows, bool with_scores)
        : batch(source.rows), features(source.columns), k(k_) {
        const size_t floats = batch * features, of_distance = k != 0 ? floats : 0;
        Scratch& memory = Scratch::of_this_thread(Scratch::kQueries);
        const size_t of_unit = unit_panels != 0 ? floats : 0, of_panels = unit_panels * features * kLanes;
        const size_t scored = with_scores ? batch : 0, of_candidates = scored * baseline::candidate_room(k);
        const size_t of_near = with_scores ? features : 0;
        memory.reserve({floats * 4, of_unit * 4, of_panels * 4, batch, batch, of_distance * 4, of_distance * 4,
                        batch * 4, batch * 8, batch * partial_rows * 4, batch * k * 8, batch * sizeof(SmallestK),
                        scored * 4, scored * 4, scored * 4, of_candidates * 8, of_near * kLanes * 4, of_near * 4});
        queries = memory.take<float>(floats);
        unit = memory.take<float>(of_unit);
        scratch.unit_panels = memory.take<float>(of_panels);
        finite = memory.take<uint8_t>(batch);
        scratch.nonzero = memory.take<uint8_t>(batch);
        transposed_ = memory.take<float>(of_distance);
        scratch.tiles = memory.take<float>(of_distance);
        scratch.beyond = memory.take<float>(batch);
        scratch.lists = memory.take<uint32_t>(batch * 2);
        scratch.partial = memory.take<float>(batch * partial_rows);
        scratch.keys = memory.take<uint64_t>(batch * k);
        scratch.smallest = memory.take<SmallestK>(batch);
        scratch.scores.shift = memory.take<float>(scored);
        scratch.scores.margin = memory.take<float>(scored);
        scratch.scores.count = memory.take<uint32_t>(scored);
        scratch.scores.candidates = memory.take<uint64_t>(of_candidates);
        scratch.scores.panel = memory.take<float>(of_near * kLanes);
        scratch.scores.query = memory.take<float>(of_near);
        with_scores_ = with_scores;
        scratch.scores.decided = &decided_;
        kernels().load_rows({source, queries, features, finite});
    }

    DistanceTask task(const Neighbours& neighbours) const {
        DistanceTask task = scratch;
        task.queries = queries;
        task.query_stride = features;
        task.batch = batch;
        task.features = features;
        task.k = neighbours.k;
        task.metric = neighbours.metric;
        task.p = neighbours.p;
        task.finite = finite;
        if (neighbours.metric == Metric::kCosine) {
            std::copy(queries, queries + batch * features, unit);
            task.queries = unit;
            kernels().normalise_rows(task);
        }
        // Once for all groups, each of which has an order of features of its own.
        kernels().transpose({task.queries, features, batch, features, transposed_});
        task.transposed = transposed_;
        return task;
    }

    QueryBlock(const QueryBlock&) = delete;
    QueryBlock& operator=(const QueryBlock&) = delete;
    ~QueryBlock() {
        if (decided_ != 0) preselected_queries.fetch_add(decided_, std::memory_order_relaxed);
    }

    // The task with the rows of one group.
    void aim(DistanceTask& task, const Bank& bank, size_t group, float* distance, size_t distance_stride) const {
        task.packed = bank.packed_of(group);
        task.order = bank.order_of(group);
        task.norms = bank.norms_of(group);
        task.by_row = with_scores_ ? bank.by_row_of(group) : nullptr;
        task.half_sums = bank.half_sums_of(group);
        task.half_squares = bank.half_squares_of(group);
        task.rows = bank.rows;
        task.distance = distance;
        task.distance_stride = distance_stride;
    }

private:
    float* transposed_;
    bool with_scores_;
    uint64_t decided_ = 0;
};

std::atomic<Preselection> preselection{Preselection::kAuto};

// Seconds for as much of an inner loop as a fraction of a small call takes; the least of some tries.
template <class Loop>
double seconds_of(const Loop& loop) {
    double least = INFINITY;
    for (int attempt = 0; attempt < 5; ++attempt) {
        const auto start = std::chrono::steady_clock::now();
        const uint64_t pairs = loop();
        const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
        least = std::min(least, spent.count() / static_cast<double>(pairs));
    }
    return least;
}

// Whether blocks of this task are given room and rows for preselection.
bool preselects(const Bank& bank, const Neighbours& neighbours, size_t batch) {
    const Preselection when = preselection.load(std::memory_order_relaxed);
    const bool can = neighbours.metric != Metric::kLp && baseline::can_preselect(batch, bank.rows, neighbours.k);
    if (!can || when != Preselection::kAuto) return can && when == Preselection::kAlways;
    return preselection_pays(neighbours.metric);
}

size_t unit_panels(const Bank& bank, const Neighbours& neighbours) {
    return neighbours.metric == Metric::kCosine ? std::min(bank.panels(), baseline::panel_step(bank.features)) : 0;
}

double work_of(const Bank& bank, size_t batch) {
    return static_cast<double>(batch) * static_cast<double>(bank.groups * bank.rows) *
           static_cast<double>(bank.features);
}

// The answers of a block, read as far as they are needed.
struct AnswerBlock {
    RowSource source;
    float* wide;           // [rows][classes] of float16 and bfloat16, null for float32
    Softmax* softmax;      // [rows]
    double* target_lse;    // [groups], NaN until it is needed
    char *mixed, *target;  // room for one row each, for answers that are made before it is said which is wanted

    AnswerBlock(const RowSource& source_, size_t groups) : source(source_), wide(nullptr) {
        const size_t values = source.dtype == DType::kFloat32 ? 0 : source.rows * source.columns;
        Scratch& scratch = Scratch::of_this_thread(Scratch::kAnswers);
        scratch.reserve(
            {values * sizeof(float), source.rows * sizeof(Softmax), groups * sizeof(double), row_bytes(), row_bytes()});
        if (values != 0) wide = scratch.take<float>(values);
        softmax = scratch.take<Softmax>(source.rows);
        target_lse = scratch.take<double>(groups);
        mixed = scratch.take<char>(row_bytes());
        target = scratch.take<char>(row_bytes());
        std::fill(target_lse, target_lse + groups, NAN);
    }

    size_t row_bytes() const { return source.columns * size_of(source.dtype); }
    const void* original(size_t i) const { return slice(source, i, 1).data; }
    const float* row(size_t i) const {
        return wide != nullptr ? wide + i * source.columns : static_cast<const float*>(original(i));
    }
    void read(size_t i, bool with_sum) {
        float* out = wide != nullptr ? wide + i * source.columns : nullptr;
        softmax[i] = kernels().softmax({original(i), source.dtype, source.columns, with_sum, out});
    }
    float confidence(size_t i) const { return 1.0f / softmax[i].sum; }
    double log_sum_exp(size_t i) const { return softmax[i].largest + std::log(double{softmax[i].sum}); }

    double log_sum_exp_of_target(const float* target, size_t group) {
        if (std::isnan(target_lse[group])) {
            const Softmax of_target = kernels().softmax({target, DType::kFloat32, source.columns, true, nullptr});
            target_lse[group] = of_target.largest + std::log(double{of_target.sum});
        }
        return target_lse[group];
    }
};

baseline::Decision decide_row(const AnswerBlock& block, size_t i, float similarity, size_t group, int64_t bucket,
                              const Mixing& mixing) {
    const float confidence = mixing.rule.needs_confidence() ? block.confidence(i) : 1.0f;
    return baseline::decide(mixing.rule, similarity, confidence, mixing.seed, static_cast<uint64_t>(bucket),
                            static_cast<uint32_t>(group));
}

BendTask towards(const AnswerBlock& block, size_t group, const Mixing& mixing, void* out) {
    BendTask task{};
    task.target = mixing.target_logits + group * block.source.columns;
    task.columns = block.source.columns;
    task.space = mixing.rule.space;
    task.dtype = block.source.dtype;
    task.out = out;
    return task;
}

// The answer of a flipped row: the target's.
void flip_row(const AnswerBlock& block, size_t group, const Mixing& mixing, void* out) {
    kernels().bend(towards(block, group, mixing, out));
}

// The answer of row i, a share `weight` > 0 of the target mixed in.
void mix_row(AnswerBlock& block, size_t i, double weight, size_t group, const Mixing& mixing, void* out) {
    BendTask task = towards(block, group, mixing, out);
    task.logits = block.row(i);
    task.weight = static_cast<float>(weight);
    if (mixing.rule.space == 1) {
        const double target_lse = block.log_sum_exp_of_target(task.target, group);
        task.log_keep = static_cast<float>(std::log1p(-weight));
        task.take = static_cast<float>(block.log_sum_exp(i) + std::log(weight));
        task.target_lse = static_cast<float>(target_lse);
        task.target_lse_low = static_cast<float>(target_lse - task.target_lse);
    }
    kernels().bend(task);
}

// Row i of the block is bent, its similarity being in (0, 1]; returns whether it was flipped.
bool bend_row(AnswerBlock& block, size_t i, float similarity, size_t group, int64_t bucket, const Mixing& mixing,
              void* out) {
    const baseline::Decision decision = decide_row(block, i, similarity, group, bucket, mixing);
    if (decision.flipped) {
        flip_row(block, group, mixing, out);
    } else {
        mix_row(block, i, decision.weight, group, mixing, out);
    }
    return decision.flipped;
}

// Bends the rows of a block that start at row `begin` of the batch. `is_read`: their softmax is known, with its sum
// where the rule needs a confidence; otherwise only rows that are bent are looked at.
void mix_block(AnswerBlock& block, bool is_read, const float* similarity, const int64_t* bucket, const Mixing& mixing,
               size_t begin) {
    const size_t row_bytes = block.row_bytes();
    const bool needs_sum = mixing.rule.space == 1 || mixing.rule.needs_confidence();
    for (size_t i = 0; i < block.source.rows; ++i) {
        const float* of_row = similarity + i * mixing.groups;
        size_t group = baseline::strongest_group(of_row, mixing.groups);
        const float strongest = std::min(of_row[group], 1.0f);
        bool bent = strongest > 0.0f;
        if (bent && (!is_read || (needs_sum && block.softmax[i].sum == 0.0f))) block.read(i, needs_sum);
        if (bent && !block.softmax[i].finite) {
            bent = false;
            group = 0;
        }
        void* out = static_cast<char*>(mixing.out) + (begin + i) * row_bytes;
        mixing.group[begin + i] = static_cast<int64_t>(group);
        mixing.flipped[begin + i] = bent && bend_row(block, i, strongest, group, bucket[i], mixing, out);
        if (!bent) std::memcpy(out, block.original(i), row_bytes);
    }
}

// A number in (0, 1) made of the low bits of another.
float any_fraction(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<float>((bits & 0xFFFFu) + 1u) / 65537.0f;
}

// As mix_block with all rows read, but the same work for each of them, whatever becomes of it: Effort::kEven.
void mix_block_evenly(AnswerBlock& block, const float* similarity, const int64_t* bucket, const Mixing& mixing,
                      size_t begin) {
    const size_t row_bytes = block.row_bytes();
    for (size_t group = 0; group < mixing.groups; ++group)
        block.log_sum_exp_of_target(mixing.target_logits + group * block.source.columns, group);
    for (size_t i = 0; i < block.source.rows; ++i) {
        const float* of_row = similarity + i * mixing.groups;
        const bool finite = block.softmax[i].finite;
        const size_t group = finite ? baseline::strongest_group(of_row, mixing.groups) : 0;
        const float strongest = std::min(of_row[group], 1.0f);
        const bool bent = strongest > 0.0f && finite;
        // An answer that is not bent takes the way of one that is, and is thrown away; with a similarity that differs
        // from row to row, as a bent one's does: always the same number would always find the same places of the
        // tables behind pow and log in the cache.
        const float similarity_instead = any_fraction(block.softmax[i].largest);
        const baseline::Decision decision =
            decide_row(block, i, bent ? strongest : similarity_instead, group, bucket[i], mixing);
        flip_row(block, group, mixing, block.target);
        mix_row(block, i, decision.weight, group, mixing, block.mixed);
        const bool flipped = bent && decision.flipped;
        const void* answers[] = {block.original(i), block.mixed, block.target};
        std::memcpy(static_cast<char*>(mixing.out) + (begin + i) * row_bytes, answers[size_t{bent} + size_t{flipped}],
                    row_bytes);
        mixing.group[begin + i] = static_cast<int64_t>(group);
        mixing.flipped[begin + i] = flipped;
    }
}

}  // namespace

namespace {

// Features by falling variance over the rows: the ones that tell most about a distance come first.
void order_features(const float* rows, size_t count, size_t features, int32_t* order) {
    std::vector<double> mean(features), variance(features);
    for (size_t row = 0; row < count; ++row)
        for (size_t d = 0; d < features; ++d) mean[d] += rows[row * features + d];
    for (double& value : mean) value /= static_cast<double>(count);
    for (size_t row = 0; row < count; ++row) {
        for (size_t d = 0; d < features; ++d) {
            const double deviation = rows[row * features + d] - mean[d];
            variance[d] += deviation * deviation;
        }
    }
    std::iota(order, order + features, 0);
    std::stable_sort(order, order + features, [&](int32_t a, int32_t b) { return variance[a] > variance[b]; });
}

}  // namespace

void pack_bank(const float* rows, size_t groups, size_t rows_of_group, size_t features, float* packed, float* norms) {
    const Bank bank{packed, norms, groups, rows_of_group, features};
    const auto writable = [](const auto* part) {
        return const_cast<std::remove_cv_t<std::remove_reference_t<decltype(*part)>>*>(part);
    };
    for (size_t group = 0; group < groups; ++group) {
        const float* of_group = rows + group * rows_of_group * features;
        int32_t* order = writable(bank.order_of(group));
        order_features(of_group, rows_of_group, features, order);
        for (size_t lane = 0; lane < bank.lanes(); ++lane) {
            float* in_panel = writable(bank.packed_of(group)) + lane / kLanes * features * kLanes + lane % kLanes;
            float* in_row = writable(bank.by_row_of(group)) + lane * features;
            const float* row = lane < rows_of_group ? of_group + lane * features : nullptr;
            double sum = 0.0, square = 0.0;
            for (size_t d = 0; d < features; ++d) {
                const float value = row == nullptr ? 0.0f : row[order[d]];
                in_panel[d * kLanes] = in_row[d] = value;
                sum += value;
                square += double{value} * value;
            }
            writable(bank.norms_of(group))[lane] = static_cast<float>(std::sqrt(square));
            writable(bank.half_sums_of(group))[lane] = static_cast<float>(sum / 2.0);
            writable(bank.half_squares_of(group))[lane] = static_cast<float>(square / 2.0);
        }
    }
}

void feature_distance(const RowSource& features, const Bank& bank, const Neighbours& neighbours, float* distance,
                      int32_t* index, size_t threads) {
    const size_t useful = useful_threads(work_of(bank, features.rows), threads);
    const size_t block = block_of(features.rows, features.columns, useful);
    for_blocks(features.rows, block, useful, [&](size_t begin, size_t rows) {
        const QueryBlock queries(slice(features, begin, rows), neighbours.k, unit_panels(bank, neighbours), 0,
                                 preselects(bank, neighbours, rows));
        DistanceTask task = queries.task(neighbours);
        task.index_stride = bank.groups * neighbours.k;
        for (size_t group = 0; group < bank.groups; ++group) {
            const size_t first = begin * bank.groups + group;
            task.index = index ? index + first * neighbours.k : nullptr;
            queries.aim(task, bank, group, distance + first, bank.groups);
            kernels().distance(task);
        }
    });
}

void sign_hash(const RowSource& features, const float* planes, size_t n_planes, int64_t* bucket, size_t threads) {
    const double work = static_cast<double>(features.rows * n_planes) * static_cast<double>(features.columns);
    const size_t useful = useful_threads(work, threads);
    const size_t block = block_of(features.rows, features.columns, useful);
    for_blocks(features.rows, block, useful, [&](size_t begin, size_t rows) {
        const QueryBlock queries(slice(features, begin, rows), 0, 0, 0, false);
        kernels().sign_hash({queries.queries, features.columns, rows, features.columns, planes, n_planes,
                             queries.finite, bucket + begin});
    });
}

void watermark_mix(const RowSource& logits, const float* similarity, const int64_t* bucket, const Mixing& mixing,
                   size_t threads) {
    // A row costs about as much as 4 multiply-adds for each class.
    const size_t useful = useful_threads(4.0 * static_cast<double>(logits.rows * logits.columns), threads);
    for_blocks(logits.rows, kLogitsRows, useful, [&](size_t begin, size_t rows) {
        AnswerBlock block(slice(logits, begin, rows), mixing.groups);
        mix_block(block, false, similarity + begin * mixing.groups, bucket + begin, mixing, begin);
    });
}

namespace {

std::atomic<bool> exhaustive{false};
std::atomic<uint32_t> memory_epoch{0};
std::atomic<uint64_t> counted[3];

void add_counts(const BoundedCounts& counts) {
    counted[0].fetch_add(counts.without_looking, std::memory_order_relaxed);
    counted[1].fetch_add(counts.by_bounds, std::memory_order_relaxed);
    counted[2].fetch_add(counts.finished, std::memory_order_relaxed);
}

// The smallest distance whose similarity is 0 (similarity_of does not rise with the distance), or infinity.
float distance_without_similarity(const SimilarityRule& rule, size_t group, float confidence) {
    const auto similarity = [&](float distance) {
        return baseline::similarity_of(distance, confidence, rule.offset[group], rule.scale[group],
                                       rule.confidence_weight);
    };
    float distance = std::max(rule.offset[group] - rule.confidence_weight * confidence, 0.0f);
    for (int step = 0; step < 4; ++step, distance = std::nextafter(distance, INFINITY))
        if (similarity(distance) == 0.0f) return distance;
    return INFINITY;
}

// Whether bounds have lately been worth their while on a group of a bank, as far as this thread has seen. Where they
// have not, seven blocks of eight are computed in full. Only time depends on it, no result.
class BoundsMemory {
public:
    static BoundsMemory& of(const float* packed_group) {
        constexpr size_t kEntries = 64;
        thread_local BoundsMemory entries[kEntries];
        BoundsMemory& entry = entries[(reinterpret_cast<uintptr_t>(packed_group) >> 12) % kEntries];
        const uint32_t epoch = memory_epoch.load(std::memory_order_relaxed);
        if (entry.packed_group_ != packed_group || entry.epoch_ != epoch) {
            entry = BoundsMemory();
            entry.packed_group_ = packed_group;
            entry.epoch_ = epoch;
        }
        return entry;
    }

    bool worth_looking() {
        if (proven_share_ > 0.125f) return true;
        blocks_in_full_ = (blocks_in_full_ + 1) % 8;
        return blocks_in_full_ == 0;
    }
    void remember(size_t queries, size_t proven) {
        if (queries == 0) return;
        const float share = static_cast<float>(proven) / static_cast<float>(queries);
        proven_share_ += (share - proven_share_) * (queries >= 16 ? 0.5f : 0.125f);
    }

private:
    const float* packed_group_ = nullptr;
    uint32_t epoch_ = 0;
    float proven_share_ = 1.0f;
    int blocks_in_full_ = 0;
};

// Queries of a block of `watermark`: sums of its block with the whole bank are kept, in at most so much memory.
constexpr size_t kPartialBytes = 4 * 1024 * 1024;
size_t bounded_block(size_t block, const Bank& bank) {
    const size_t fitting = kPartialBytes / (baseline::partial_stride(bank.rows) * sizeof(float)) / 16 * 16;
    return std::min(block, std::max<size_t>(16, fitting));
}

struct Similarities {
    const QueryBlock& queries;
    const AnswerBlock& answers;
    const Bank& bank;
    const SimilarityRule& rule;
    bool with_confidence, even;

    bool finite(size_t i) const { return queries.finite[i] && answers.softmax[i].finite; }
    float confidence(size_t i) const { return with_confidence && finite(i) ? answers.confidence(i) : 1.0f; }

    // Of one group, for all queries of the block, into every groups-th element of `out`.
    void compute(DistanceTask& task, size_t group, float* enough, float* out) const {
        BoundsMemory& memory = BoundsMemory::of(bank.packed_of(group));
        const bool bounded = !even && !exhaustive.load(std::memory_order_relaxed);
        const bool looks = bounded && memory.worth_looking();
        for (size_t i = 0; looks && i < queries.batch; ++i)
            enough[i] = finite(i) ? distance_without_similarity(rule, group, confidence(i)) : -INFINITY;
        task.enough = looks ? enough : nullptr;
        const BoundedCounts before = *task.counts;
        queries.aim(task, bank, group, out, bank.groups);
        kernels().distance(task);
        if (looks) {
            const size_t proven = task.counts->by_bounds - before.by_bounds;
            memory.remember(proven + task.counts->finished - before.finished, proven);
        } else if (bounded) {
            task.counts->finished += queries.batch;
        }
        for (size_t i = 0; i < queries.batch; ++i) {
            float& value = out[i * bank.groups];
            value = finite(i) ? baseline::similarity_of(value, confidence(i), rule.offset[group], rule.scale[group],
                                                        rule.confidence_weight)
                              : 0.0f;
        }
    }
};

// Buckets of the rows that are bent: nobody asks for the others', which are most.
void hash_bent_rows(const QueryBlock& queries, const float* similarity, size_t groups, const float* planes,
                    size_t n_planes, int64_t* bucket) {
    const size_t width = queries.features;
    for (size_t i = 0; i < queries.batch; ++i) {
        const float* of_row = similarity + i * groups;
        bucket[i] = 0;
        if (std::any_of(of_row, of_row + groups, [](float s) { return s > 0.0f; }))
            kernels().sign_hash(
                {queries.queries + i * width, width, 1, width, planes, n_planes, queries.finite + i, bucket + i});
    }
}

}  // namespace

uint64_t preselected() { return preselected_queries.load(std::memory_order_relaxed); }
void set_preselection(Preselection when) { preselection.store(when, std::memory_order_relaxed); }

// Measured once for a level and a metric, in some fifty microseconds: on some machines a difference costs a slot that a
// multiply-add could have used, on others the two go to pipes of their own. Far from the limit on both kinds (1.0 and
// 2.0 times seen), so noise does not decide; and if it did, only time would depend on it.
bool preselection_pays(Metric metric) {
    if (metric == Metric::kLp) return false;
    constexpr double kLeastGain = 1.35;
    constexpr uint64_t kRepeats = 16;
    static std::atomic<const Kernels*> measured_at[4];
    static std::atomic<bool> pays[4];
    const size_t slot = static_cast<size_t>(metric);
    const Kernels& level = kernels();
    if (measured_at[slot].load(std::memory_order_acquire) != &level) {
        const double direct = seconds_of([&] { return level.ceiling(metric, 2.0, kRepeats); });
        const double score = seconds_of([&] { return level.score_ceiling(metric, kRepeats); });
        pays[slot].store(direct > kLeastGain * score, std::memory_order_relaxed);
        measured_at[slot].store(&level, std::memory_order_release);
    }
    return pays[slot].load(std::memory_order_relaxed);
}

void set_exhaustive(bool on) { exhaustive.store(on, std::memory_order_relaxed); }
void forget_bounds() { memory_epoch.fetch_add(1, std::memory_order_relaxed); }

BoundedCounts bounded_counts() { return {counted[0].load(), counted[1].load(), counted[2].load()}; }

void watermark(const RowSource& features, const RowSource& logits, const Bank& bank, const Neighbours& neighbours,
               const float* planes, size_t n_planes, const SimilarityRule& rule, const Mixing& mixing,
               float* similarity, size_t threads, Effort effort) {
    const bool even = effort == Effort::kEven;
    const size_t useful = useful_threads(work_of(bank, features.rows), threads);
    const size_t block = bounded_block(block_of(features.rows, features.columns, useful), bank);
    const bool with_confidence = mixing.rule.needs_confidence() || rule.confidence_weight != 0.0f;
    for_blocks(features.rows, block, useful, [&](size_t begin, size_t rows) {
        AnswerBlock answers(slice(logits, begin, rows), mixing.groups);
        for (size_t i = 0; i < rows; ++i) answers.read(i, with_confidence || (even && mixing.rule.space == 1));
        const QueryBlock queries(slice(features, begin, rows), neighbours.k, unit_panels(bank, neighbours),
                                 baseline::partial_stride(bank.rows), !even && preselects(bank, neighbours, rows));
        const Similarities similarities{queries, answers, bank, rule, with_confidence, even};
        DistanceTask task = queries.task(neighbours);
        task.every_row = even;
        BoundedCounts counts{};
        task.counts = &counts;
        float* of_block = similarity + begin * bank.groups;
        float enough[kMostQueries];
        for (size_t group = 0; group < bank.groups; ++group)
            similarities.compute(task, group, enough, of_block + group);
        add_counts(counts);
        int64_t bucket[kMostQueries] = {};
        if (even) {
            if (mixing.rule.flip_bins > 0)
                kernels().sign_hash({queries.queries, queries.features, rows, queries.features, planes, n_planes,
                                     queries.finite, bucket});
            return mix_block_evenly(answers, of_block, bucket, mixing, begin);
        }
        if (mixing.rule.flip_bins > 0) hash_bent_rows(queries, of_block, bank.groups, planes, n_planes, bucket);
        mix_block(answers, true, of_block, bucket, mixing, begin);
    });
}

}  // namespace honeytrace
