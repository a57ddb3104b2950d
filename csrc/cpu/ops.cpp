#include "cpu/ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "core/halves.h"
#include "core/topk.h"
#include "cpu/dispatch.h"
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
    static Scratch& of_this_thread() {
        thread_local Scratch scratch;
        return scratch;
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

// A block of queries as float32, and the scratch of the distance kernel.
struct QueryBlock {
    size_t batch, features, k;
    float* queries;
    float* unit;  // a copy that cosine may normalise
    uint8_t* finite;
    uint8_t* nonzero;
    float* tiles;
    uint64_t* keys;
    SmallestK* smallest;

    QueryBlock(const RowSource& source, size_t k_, bool cosine) : batch(source.rows), features(source.columns), k(k_) {
        const size_t floats = batch * features;
        Scratch& scratch = Scratch::of_this_thread();
        scratch.reserve({floats * 4, cosine ? floats * 4 : 0, batch, batch, k ? floats * 4 : 0, batch * k * 8,
                         batch * sizeof(SmallestK)});
        queries = scratch.take<float>(floats);
        unit = scratch.take<float>(cosine ? floats : 0);
        finite = scratch.take<uint8_t>(batch);
        nonzero = scratch.take<uint8_t>(batch);
        tiles = scratch.take<float>(k ? floats : 0);
        keys = scratch.take<uint64_t>(batch * k);
        smallest = scratch.take<SmallestK>(batch);
        kernels().load_rows({source, queries, features, finite});
    }

    DistanceTask task(const Neighbours& neighbours) const {
        DistanceTask task{};
        task.queries = queries;
        task.query_stride = features;
        task.batch = batch;
        task.features = features;
        task.k = neighbours.k;
        task.metric = neighbours.metric;
        task.p = neighbours.p;
        task.finite = finite;
        task.nonzero = nonzero;
        task.tiles = tiles;
        task.keys = keys;
        task.smallest = smallest;
        if (neighbours.metric == Metric::kCosine) {
            std::copy(queries, queries + batch * features, unit);
            task.queries = unit;
            kernels().normalise_rows(task);
        }
        return task;
    }
};

void distances_to_group(DistanceTask task, const Bank& bank, size_t group, float* distance, size_t distance_stride,
                        int32_t* index, size_t index_stride) {
    task.packed = bank.packed_of(group);
    task.norms = bank.norms_of(group);
    task.rows = bank.rows;
    task.distance = distance;
    task.distance_stride = distance_stride;
    task.index = index;
    task.index_stride = index_stride;
    kernels().distance(task);
}

double work_of(const Bank& bank, size_t batch) {
    return static_cast<double>(batch) * static_cast<double>(bank.groups * bank.rows) *
           static_cast<double>(bank.features);
}

void store_one(void* row, DType dtype, size_t column, double value) {
    const float rounded =
        static_cast<float>(std::clamp(value, -double{baseline::kLargestFloat32}, double{baseline::kLargestFloat32}));
    if (dtype == DType::kFloat32) {
        static_cast<float*>(row)[column] = rounded;
    } else {
        static_cast<uint16_t*>(row)[column] =
            dtype == DType::kFloat16 ? baseline::float16_from_float(rounded) : baseline::bfloat16_from_float(rounded);
    }
}

double log_sum_exp(const float* values, size_t count) {
    double largest = -INFINITY;
    for (size_t c = 0; c < count; ++c) largest = std::max(largest, double{values[c]});
    double sum = 0.0;
    for (size_t c = 0; c < count; ++c) sum += std::exp(values[c] - largest);
    return largest + std::log(sum);
}

// Writes the bent answer of one row. logits: float32 copy of the row.
void write_mixed(const float* logits, size_t classes, const float* target, int space, double weight, DType dtype,
                 void* out) {
    if (space == 0) {
        const float rounded = static_cast<float>(weight);
        for (size_t c = 0; c < classes; ++c)
            store_one(out, dtype, c, baseline::mix_logit(logits[c], target[c], rounded));
        return;
    }
    const double lse = log_sum_exp(logits, classes), target_lse = log_sum_exp(target, classes);
    const double log_keep = std::log(1.0 - weight), log_weight = std::log(weight);
    for (size_t c = 0; c < classes; ++c)
        store_one(out, dtype, c,
                  baseline::mix_probability(logits[c], log_keep, lse, log_weight, target[c] - target_lse));
}

// A block of logits as float32, with the confidences where they are asked for.
struct LogitsBlock {
    RowSource source;
    std::vector<float> values;
    std::vector<uint8_t> finite;
    std::vector<float> confidence;

    LogitsBlock(const RowSource& source_, bool with_confidence)
        : source(source_), values(source.rows * source.columns), finite(source.rows), confidence(source.rows, 1.0f) {
        kernels().load_rows({source, values.data(), source.columns, finite.data()});
        if (with_confidence)
            kernels().confidence({values.data(), source.columns, source.rows, source.columns, confidence.data()});
    }

    const float* row(size_t i) const { return values.data() + i * source.columns; }
    const void* original(size_t i) const { return slice(source, i, 1).data; }
};

// Bends the rows of a block that start at row `begin` of the batch.
void mix_block(const LogitsBlock& block, const float* similarity, const int64_t* bucket, const Mixing& mixing,
               size_t begin) {
    const size_t classes = block.source.columns, row_bytes = classes * size_of(block.source.dtype);
    for (size_t i = 0; i < block.source.rows; ++i) {
        const float* of_row = similarity + i * mixing.groups;
        const size_t group = block.finite[i] ? baseline::strongest_group(of_row, mixing.groups) : 0;
        const float strongest = block.finite[i] && of_row[group] > 0.0f ? std::min(of_row[group], 1.0f) : 0.0f;
        void* out = static_cast<char*>(mixing.out) + (begin + i) * row_bytes;
        mixing.group[begin + i] = static_cast<int64_t>(group);
        mixing.flipped[begin + i] = false;
        if (strongest == 0.0f) {
            std::memcpy(out, block.original(i), row_bytes);
            continue;
        }
        const float* target = mixing.target_logits + group * classes;
        const baseline::Decision decision =
            baseline::decide(mixing.rule, strongest, block.confidence[i], mixing.seed, static_cast<uint64_t>(bucket[i]),
                             static_cast<uint32_t>(group));
        mixing.flipped[begin + i] = decision.flipped;
        if (decision.flipped) {
            for (size_t c = 0; c < classes; ++c) store_one(out, block.source.dtype, c, target[c]);
        } else {
            write_mixed(block.row(i), classes, target, mixing.rule.space, decision.weight, block.source.dtype, out);
        }
    }
}

}  // namespace

void pack_bank(const float* rows, size_t groups, size_t rows_of_group, size_t features, float* packed, float* norms) {
    const size_t panels = (rows_of_group + kLanes - 1) / kLanes;
    for (size_t group = 0; group < groups; ++group) {
        for (size_t lane = 0; lane < panels * kLanes; ++lane, ++norms) {
            float* out = packed + (group * panels + lane / kLanes) * features * kLanes + lane % kLanes;
            const float* row = lane < rows_of_group ? rows + (group * rows_of_group + lane) * features : nullptr;
            double square = 0.0;
            for (size_t d = 0; d < features; ++d) {
                const float value = row == nullptr ? 0.0f : row[d];
                out[d * kLanes] = value;
                square += double{value} * value;
            }
            *norms = static_cast<float>(std::sqrt(square));
        }
    }
}

void feature_distance(const RowSource& features, const Bank& bank, const Neighbours& neighbours, float* distance,
                      int32_t* index, size_t threads) {
    const size_t useful = useful_threads(work_of(bank, features.rows), threads);
    const size_t block = block_of(features.rows, features.columns, useful);
    for_blocks(features.rows, block, useful, [&](size_t begin, size_t rows) {
        const QueryBlock queries(slice(features, begin, rows), neighbours.k, neighbours.metric == Metric::kCosine);
        const DistanceTask task = queries.task(neighbours);
        for (size_t group = 0; group < bank.groups; ++group) {
            const size_t first = begin * bank.groups + group;
            distances_to_group(task, bank, group, distance + first, bank.groups,
                               index ? index + first * neighbours.k : nullptr, bank.groups * neighbours.k);
        }
    });
}

void sign_hash(const RowSource& features, const float* planes, size_t n_planes, int64_t* bucket, size_t threads) {
    const double work = static_cast<double>(features.rows * n_planes) * static_cast<double>(features.columns);
    const size_t useful = useful_threads(work, threads);
    const size_t block = block_of(features.rows, features.columns, useful);
    for_blocks(features.rows, block, useful, [&](size_t begin, size_t rows) {
        const QueryBlock queries(slice(features, begin, rows), 0, false);
        kernels().sign_hash({queries.queries, features.columns, rows, features.columns, planes, n_planes,
                             queries.finite, bucket + begin});
    });
}

void watermark_mix(const RowSource& logits, const float* similarity, const int64_t* bucket, const Mixing& mixing,
                   size_t threads) {
    // A row costs about as much as 8 multiply-adds for each class.
    const size_t useful = useful_threads(8.0 * static_cast<double>(logits.rows * logits.columns), threads);
    for_blocks(logits.rows, kLogitsRows, useful, [&](size_t begin, size_t rows) {
        const LogitsBlock block(slice(logits, begin, rows), mixing.rule.needs_confidence());
        mix_block(block, similarity + begin * mixing.groups, bucket + begin, mixing, begin);
    });
}

void watermark(const RowSource& features, const RowSource& logits, const Bank& bank, const Neighbours& neighbours,
               const float* planes, size_t n_planes, const SimilarityRule& rule, const Mixing& mixing,
               float* similarity, size_t threads) {
    const size_t useful = useful_threads(work_of(bank, features.rows), threads);
    const size_t block = block_of(features.rows, features.columns, useful);
    const bool with_confidence = mixing.rule.needs_confidence() || rule.confidence_weight != 0.0f;
    for_blocks(features.rows, block, useful, [&](size_t begin, size_t rows) {
        const LogitsBlock answers(slice(logits, begin, rows), with_confidence);
        const QueryBlock queries(slice(features, begin, rows), neighbours.k, neighbours.metric == Metric::kCosine);
        const DistanceTask task = queries.task(neighbours);
        float* of_block = similarity + begin * bank.groups;
        for (size_t group = 0; group < bank.groups; ++group)
            distances_to_group(task, bank, group, of_block + group, bank.groups, nullptr, 0);
        for (size_t i = 0; i < rows; ++i) {
            for (size_t group = 0; group < bank.groups; ++group) {
                float& value = of_block[i * bank.groups + group];
                value = queries.finite[i] && answers.finite[i]
                            ? baseline::similarity_of(value, answers.confidence[i], rule.offset[group],
                                                      rule.scale[group], rule.confidence_weight)
                            : 0.0f;
            }
        }
        std::vector<int64_t> bucket(rows);
        kernels().sign_hash({queries.queries, features.columns, rows, features.columns, planes, n_planes,
                             queries.finite, bucket.data()});
        mix_block(answers, of_block, bucket.data(), mixing, begin);
    });
}

}  // namespace honeytrace
