// The core's operations on whatever a fuzzer makes of the bytes: every dtype, metric and size with its tails, NaN,
// infinities, denormals and numbers at the end of the range.
//
// What must hold, on every instruction set of this build that runs here:
// - nothing is read or written out of bounds (arrays are exactly as large as they must be), nothing is undefined;
// - distances are those of a plain loop in double, hashes those wherever double can tell the side, mixed answers those
//   of the formula in double;
// - a row alone gives the bits that it gives in a batch; levels with a fused multiply-add give equal bits;
// - `watermark` gives bit for bit what feature_distance, sign_hash and watermark_mix give one after the other, whether
//   bounds are used or every distance is computed;
// - an answer that is not bent is the model's own, bit for bit, and no answer of finite logits is NaN or infinite.
//
// csrc/fuzz/Makefile builds it with libFuzzer, or with driver.cpp where there is none.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "bytes.h"
#include "core/mixing.h"
#include "cpu/dispatch.h"
#include "cpu/ops.h"

using namespace honeytrace;
using namespace honeytrace::fuzz;

namespace {

#define REQUIRE(condition, ...)                                                              \
    do {                                                                                     \
        if (!(condition)) {                                                                  \
            std::fprintf(stderr, "%s:%d: not true: %s\n  ", __FILE__, __LINE__, #condition); \
            std::fprintf(stderr, __VA_ARGS__);                                               \
            std::fprintf(stderr, "\n");                                                      \
            std::abort();                                                                    \
        }                                                                                    \
    } while (false)

const std::vector<std::string>& levels() {
    static const std::vector<std::string> names = usable_levels();
    return names;
}

bool same_bits(float a, float b) { return baseline::bits_of(a) == baseline::bits_of(b); }

struct PackedBank {
    size_t groups, rows, features;
    Exactly<float> plain, packed, norms;

    PackedBank(Bytes& bytes, size_t groups_, size_t rows_, size_t features_)
        : groups(groups_),
          rows(rows_),
          features(features_),
          plain(finite_numbers(bytes, groups * rows * features)),
          packed(Bank{nullptr, nullptr, groups, rows, features}.packed_floats()),
          norms(groups * panels() * kLanes) {
        pack_bank(plain.get(), groups, rows, features, packed.get(), norms.get());
    }
    size_t panels() const { return (rows + kLanes - 1) / kLanes; }
    Bank bank() const { return {packed.get(), norms.get(), groups, rows, features}; }
    const float* row(size_t group, size_t row) const { return plain.get() + (group * rows + row) * features; }
};

void check_packing(const PackedBank& held) {
    const Bank bank = held.bank();
    for (size_t group = 0; group < held.groups; ++group) {
        std::vector<int> seen(held.features, 0);
        for (size_t d = 0; d < held.features; ++d) ++seen.at(static_cast<size_t>(bank.order_of(group)[d]));
        REQUIRE(std::count(seen.begin(), seen.end(), 1) == static_cast<long>(held.features), "order is no permutation");
        for (size_t lane = 0; lane < held.panels() * kLanes; ++lane) {
            const float* panel = bank.packed_of(group) + lane / kLanes * held.features * kLanes + lane % kLanes;
            for (size_t d = 0; d < held.features; ++d) {
                const float expected = lane < held.rows ? held.row(group, lane)[bank.order_of(group)[d]] : 0.0f;
                REQUIRE(same_bits(panel[d * kLanes], expected), "row %zu, place %zu", lane, d);
            }
            if (lane >= held.rows) REQUIRE(bank.norms_of(group)[lane] == 0.0f, "lane %zu", lane);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Distances

struct Expected {
    double distance;
    bool known;  // false: float32 itself cannot hold a difference, or nearly so
};

Expected expected_pair(const Rows& queries, size_t i, const float* row, size_t features, Metric metric, double p) {
    double largest = 0, sum = 0, of_query = 0, of_row = 0;
    for (size_t d = 0; d < features; ++d) {
        const double q = queries.at(i, d), b = row[d];
        largest = std::max(largest, std::fabs(q - b));
        of_query = std::max(of_query, std::fabs(q));
        of_row = std::max(of_row, std::fabs(b));
    }
    if (metric == Metric::kCosine) {
        if (of_query == 0 || of_row == 0) return {1.0, true};
        double qq = 0, bb = 0;
        for (size_t d = 0; d < features; ++d) {
            const double q = queries.at(i, d) / of_query, b = row[d] / of_row;
            qq += q * q;
            bb += b * b;
        }
        for (size_t d = 0; d < features; ++d) {
            const double q = queries.at(i, d) / of_query / std::sqrt(qq), b = row[d] / of_row / std::sqrt(bb);
            sum += (q - b) * (q - b);
        }
        return {sum / 2, true};
    }
    if (largest == 0) return {0, true};
    const double power = metric == Metric::kL1 ? 1.0 : metric == Metric::kL2 ? 2.0 : static_cast<float>(p);
    for (size_t d = 0; d < features; ++d)
        sum += std::pow(std::fabs(double{queries.at(i, d)} - row[d]) / largest, power);
    // l1 adds up the differences as they are, and so does the mean over k rows.
    const double room = 3e38 / static_cast<double>(features) / 300;
    return {largest * std::pow(sum / static_cast<double>(features), 1 / power), largest < room};
}

struct Distances {
    Exactly<float> distance;
    Exactly<int32_t> index;

    Distances(const Rows& queries, size_t batch, const PackedBank& held, const Neighbours& neighbours)
        : distance(batch * held.groups), index(batch * held.groups * neighbours.k) {
        feature_distance(queries.source(), held.bank(), neighbours, distance.get(), index.get(), 1);
    }
};

void check_distances(const Rows& queries, size_t batch, const PackedBank& held, const Neighbours& neighbours,
                     const Distances& found, const char* level) {
    const size_t k = neighbours.k;
    for (size_t i = 0; i < batch; ++i) {
        const bool finite = queries.finite(i);
        for (size_t group = 0; group < held.groups; ++group) {
            const float distance = found.distance[i * held.groups + group];
            const int32_t* index = found.index.get() + (i * held.groups + group) * k;
            std::vector<bool> taken(held.rows, false);
            for (size_t j = 0; j < k; ++j) {
                REQUIRE(index[j] >= 0 && static_cast<size_t>(index[j]) < held.rows && !taken[index[j]],
                        "%s: index %d of %zu rows", level, index[j], held.rows);
                taken[index[j]] = true;
                if (!finite) REQUIRE(index[j] == static_cast<int32_t>(j), "%s", level);
            }
            REQUIRE(!std::isnan(distance) && distance >= 0, "%s: distance %g", level, double{distance});
            if (!finite) {
                REQUIRE(distance == INFINITY, "%s: distance %g of a query that is not finite", level, double{distance});
                continue;
            }
            std::vector<double> pairs(held.rows);
            bool known = true;
            for (size_t row = 0; row < held.rows; ++row) {
                const Expected expected =
                    expected_pair(queries, i, held.row(group, row), held.features, neighbours.metric, neighbours.p);
                pairs[row] = expected.distance;
                known = known && expected.known;
            }
            if (!known) continue;
            double of_chosen = 0, smallest = 0;
            for (size_t j = 0; j < k; ++j) of_chosen += pairs[index[j]] / static_cast<double>(k);
            std::sort(pairs.begin(), pairs.end());
            for (size_t j = 0; j < k; ++j) smallest += pairs[j] / static_cast<double>(k);
            // Three times what the tests of the core allow; quotients by norms are rounded to float32, denormals to
            // their step.
            const double off = neighbours.metric == Metric::kCosine ? 2e-6 : 0x1p-148;
            // Sums taken again, as of rows whose norm is beyond float32, are not added up in blocks of 256.
            const double long_sums = held.features > 256 ? static_cast<double>(held.features) * 0x1p-24 : 0.0;
            const double limit = (6e-6 + long_sums) * smallest + off;
            REQUIRE(std::fabs(distance - smallest) <= limit, "%s: metric %d p %g k %zu: %.9g, expected %.9g", level,
                    static_cast<int>(neighbours.metric), neighbours.p, k, double{distance}, smallest);
            REQUIRE(std::fabs(of_chosen - smallest) <= 2 * limit, "%s: chosen rows at %.9g, expected %.9g", level,
                    of_chosen, smallest);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Hashes

void check_hashes(const Rows& queries, size_t batch, const Exactly<float>& planes, size_t n_planes, size_t features,
                  const Exactly<int64_t>& bucket, const char* level) {
    for (size_t i = 0; i < batch; ++i) {
        const auto word = static_cast<uint64_t>(bucket[i]);
        if (!queries.finite(i)) {
            REQUIRE(word == 0, "%s", level);
            continue;
        }
        REQUIRE(n_planes == 64 || word >> n_planes == 0, "%s: bits above the planes", level);
        for (size_t plane = 0; plane < n_planes; ++plane) {
            double dot = 0, size = 0;
            for (size_t d = 0; d < features; ++d) {
                const double product = double{queries.at(i, d)} * planes[plane * features + d];
                dot += product;
                size += std::fabs(product);
            }
            // Too near to tell, or beyond float32.
            if (size > 1e38 || std::fabs(dot) < size * 1e-5 + static_cast<double>(features) * 0x1p-147) continue;
            REQUIRE((word >> plane & 1u) == (dot >= 0 ? 1u : 0u), "%s: plane %zu, dot %g", level, plane, dot);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Mixing

MixingRule rule_of(Bytes& bytes) {
    constexpr double powers[] = {0.25, 0.5, 1.0, 2.0, 3.0, 0.1, 7.7, 100.0, 1e-300, 1e300};
    constexpr double shares[] = {0.0, 1.0, 0.5, 0.1, 0.95, 5e-324};
    const auto power = [&] { return powers[bytes.below(10)]; };
    const auto share = [&] { return shares[bytes.below(6)]; };
    MixingRule rule{};
    const bool shapes = bytes.flag();
    rule.low_confidence = shapes ? share() : 0.0;
    rule.low_power = power();
    rule.high_confidence = shapes ? share() : 1.0;
    rule.high_power = power();
    rule.space = bytes.byte() & 1;
    rule.strength = share();
    rule.mixing_power = power();
    rule.flip_power = power();
    constexpr int64_t bins[] = {0, 0, 1, 10, 1000, 2147483647};
    rule.flip_bins = bins[bytes.below(6)];
    return rule;
}

struct Answers {
    Exactly<unsigned char> out;
    Exactly<int64_t> group;
    Exactly<bool> flipped;

    Answers(const Rows& logits, size_t batch, size_t classes)
        : out(batch * classes * logits.element()), group(batch), flipped(batch) {}
    Mixing mixing(const Exactly<float>& targets, size_t groups, const MixingRule& rule, uint64_t seed) const {
        return {targets.get(), groups, rule, seed, out.get(), group.get(), flipped.get()};
    }
    bool equals(const Answers& other) const {
        return std::equal(out.get(), out.get() + out.size(), other.out.get()) &&
               std::equal(group.get(), group.get() + group.size(), other.group.get()) &&
               std::equal(flipped.get(), flipped.get() + flipped.size(), other.flipped.get());
    }
};

double largest_of(DType dtype) {
    return dtype == DType::kFloat32   ? 3.4028234663852886e38
           : dtype == DType::kFloat16 ? 65504.0
                                      : 3.3895313892515355e38;
}

double log_sum_exp(const std::vector<double>& x) {
    const double top = *std::max_element(x.begin(), x.end());
    double sum = 0;
    for (double value : x) sum += std::exp(value - top);
    return top + std::log(sum);
}

// One bent answer against the formula in double. `decision` comes from the core's own function in double.
void check_bent(const Rows& logits, size_t i, size_t classes, const float* target, const MixingRule& rule,
                const baseline::Decision& decision, const void* out, const char* level) {
    std::vector<double> z(classes), r(classes);
    for (size_t c = 0; c < classes; ++c) {
        z[c] = logits.at(i, c);
        r[c] = target[c];
    }
    const double of_z = log_sum_exp(z), of_r = log_sum_exp(r), w = decision.weight;
    const double unit = logits.dtype == DType::kFloat32 ? 0 : logits.dtype == DType::kFloat16 ? 0x1p-10 : 0x1p-7;
    for (size_t c = 0; c < classes; ++c) {
        double want = r[c], size = 0;
        if (!decision.flipped && rule.space == 0) {
            want = (1 - w) * z[c] + w * r[c];
            size = std::fabs(z[c]) + std::fabs(r[c]);
        } else if (!decision.flipped) {
            want = baseline::mix_probability(z[c], std::log1p(-w), of_z, std::log(w), r[c] - of_r);
            size = std::fabs(z[c]) + std::fabs(r[c]) + std::fabs(of_z) + std::fabs(of_r) + 1;
            if (w > 0) size += std::fabs(std::log(w));
            if (w < 1) size += std::fabs(std::log1p(-w));
        }
        const double most = largest_of(logits.dtype);
        want = std::min(std::max(want, -most), most);
        const double got = Rows::value(logits.dtype, out, c);
        const double limit = 2e-6 * size + unit * std::fabs(want) + 0x1p-24;
        REQUIRE(std::fabs(got - want) <= limit, "%s: space %d class %zu w %g: %.9g, expected %.9g (z %g, r %g)", level,
                rule.space, c, w, got, want, z[c], r[c]);
    }
}

void check_answers(const Rows& logits, size_t batch, size_t classes, const float* similarity,
                   const Exactly<float>& targets, size_t groups, const MixingRule& rule, uint64_t seed,
                   const Exactly<int64_t>& bucket, const Answers& answers, const char* level) {
    for (size_t i = 0; i < batch; ++i) {
        const auto* out = answers.out.get() + i * classes * logits.element();
        const bool finite = logits.finite(i);
        float strongest = 0;
        size_t group = 0;
        for (size_t g = 0; g < groups; ++g) {
            if (similarity[i * groups + g] > strongest) {
                strongest = similarity[i * groups + g];
                group = g;
            }
        }
        const bool bent = finite && strongest > 0;
        REQUIRE(answers.group[i] == static_cast<int64_t>(bent ? group : 0), "%s: group %lld", level,
                static_cast<long long>(answers.group[i]));
        if (!bent) {
            REQUIRE(std::memcmp(out, logits.row(i).data, classes * logits.element()) == 0,
                    "%s: an answer that is not bent has changed", level);
            REQUIRE(!answers.flipped[i], "%s: flipped, but not bent", level);
            continue;
        }
        for (size_t c = 0; c < classes; ++c)
            REQUIRE(std::isfinite(Rows::value(logits.dtype, out, c)), "%s: class %zu is not finite", level, c);
        double top = -INFINITY, sum = 0;
        for (size_t c = 0; c < classes; ++c) top = std::max(top, double{logits.at(i, c)});
        for (size_t c = 0; c < classes; ++c) sum += std::exp(logits.at(i, c) - top);
        // Which side of a threshold a confidence falls on may hang on its last bits.
        const double confidence = 1 / sum;
        const auto near = [&](double bound) { return std::fabs(confidence - bound) < 1e-5; };
        if (rule.needs_confidence() && (near(rule.low_confidence) || near(rule.high_confidence))) continue;
        const baseline::Decision decision =
            baseline::decide(rule, std::min(strongest, 1.0f), static_cast<float>(confidence), seed,
                             static_cast<uint64_t>(bucket[i]), static_cast<uint32_t>(group));
        REQUIRE(answers.flipped[i] == decision.flipped, "%s: flipped %d", level, answers.flipped[i]);
        check_bent(logits, i, classes, targets.get() + group * classes, rule, decision, out, level);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The targets

struct Sizes {
    size_t batch, groups, rows, features, k;

    explicit Sizes(Bytes& bytes) {
        batch = bytes.size(0, 40);
        groups = bytes.size(1, 3);
        rows = bytes.size(1, 70);
        features = bytes.size(1, 70);
        // Now and then beyond a block of queries, of features, or the sorted array of neighbours.
        switch (bytes.byte() % 32) {
            case 0: batch += 60; break;
            case 1: features += 240; break;
            case 2: rows += 240; break;
            case 3: features += 900; break;
        }
        while (batch * groups * rows * features > 10000 && batch > 3) batch /= 2;
        while (batch * groups * rows * features > 20000 && rows > 20 && features > 20) rows /= 2;
        k = bytes.size(1, rows);
    }
};

Neighbours neighbours_of(Bytes& bytes, size_t k) {
    constexpr double exponents[] = {1.0, 1.1, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.3, 8.0, 16.0, 40.0, 300.5, 1e4, 1e30};
    const auto metric = static_cast<Metric>(bytes.byte() % 4);
    return {k, metric, metric == Metric::kLp ? exponents[bytes.below(15)] : 1.0};
}

void fuzz_distance(Bytes& bytes) {
    const Sizes sizes(bytes);
    const Neighbours neighbours = neighbours_of(bytes, sizes.k);
    const PackedBank held(bytes, sizes.groups, sizes.rows, sizes.features);
    check_packing(held);
    const Rows queries(bytes, sizes.batch, sizes.features);
    const size_t one = sizes.batch == 0 ? 0 : bytes.below(sizes.batch);
    std::unique_ptr<Distances> of_fused;
    for (const std::string& level : levels()) {
        set_level(level);
        set_preselection(Preselection::kNever);
        auto found = std::make_unique<Distances>(queries, sizes.batch, held, neighbours);
        set_preselection(Preselection::kAlways);
        const Distances chosen(queries, sizes.batch, held, neighbours);
        for (size_t i = 0; i < found->distance.size(); ++i)
            REQUIRE(same_bits(found->distance[i], chosen.distance[i]),
                    "%s: metric %d k %zu (%zu, %zu, %zu, %zu) at %zu: %.9g, by scores %.9g", level.c_str(),
                    static_cast<int>(neighbours.metric), neighbours.k, sizes.batch, sizes.groups, sizes.rows,
                    sizes.features, i, double{found->distance[i]}, double{chosen.distance[i]});
        for (size_t i = 0; i < found->index.size(); ++i)
            REQUIRE(found->index[i] == chosen.index[i], "%s: row %d, by scores %d", level.c_str(), found->index[i],
                    chosen.index[i]);
        check_distances(queries, sizes.batch, held, neighbours, *found, level.c_str());
        if (sizes.batch > 0) {
            Exactly<float> alone(sizes.groups);
            feature_distance(queries.row(one), held.bank(), neighbours, alone.get(), nullptr, 1);
            for (size_t g = 0; g < sizes.groups; ++g)
                REQUIRE(same_bits(alone[g], found->distance[one * sizes.groups + g]),
                        "%s: alone %.9g, in the batch %.9g", level.c_str(), double{alone[g]},
                        double{found->distance[one * sizes.groups + g]});
        }
        if (level == "scalar") continue;
        if (of_fused != nullptr)
            for (size_t i = 0; i < found->distance.size(); ++i)
                REQUIRE(same_bits(found->distance[i], of_fused->distance[i]), "%s", level.c_str());
        of_fused = std::move(found);
    }
}

void fuzz_hash(Bytes& bytes) {
    const size_t batch = bytes.size(0, 70), features = bytes.size(1, 70), n_planes = bytes.size(1, 64);
    const Exactly<float> planes = finite_numbers(bytes, n_planes * features);
    const Rows queries(bytes, batch, features);
    const size_t one = batch == 0 ? 0 : bytes.below(batch);
    for (const std::string& level : levels()) {
        set_level(level);
        const Exactly<int64_t> bucket(batch), alone(1);
        sign_hash(queries.source(), planes.get(), n_planes, bucket.get(), 1);
        check_hashes(queries, batch, planes, n_planes, features, bucket, level.c_str());
        if (batch == 0) continue;
        sign_hash(queries.row(one), planes.get(), n_planes, alone.get(), 1);
        REQUIRE(alone[0] == bucket[one], "%s: alone and in the batch differ", level.c_str());
    }
}

void fuzz_mix(Bytes& bytes) {
    const size_t batch = bytes.size(0, 40), classes = bytes.size(1, 70), groups = bytes.size(1, 5);
    const MixingRule rule = rule_of(bytes);
    const uint64_t seed = bytes.random();
    const Exactly<float> targets = finite_numbers(bytes, groups * classes);
    const Rows logits(bytes, batch, classes);
    Exactly<float> similarity(batch * groups);
    const bool odd = bytes.flag();
    for (size_t i = 0; i < similarity.size(); ++i)
        similarity[i] =
            odd ? number(bytes, Kind::kSpecial) : static_cast<float>(std::max(0.0, bytes.uniform() * 1.5 - 0.5));
    const Exactly<int64_t> bucket(batch);
    for (size_t i = 0; i < batch; ++i) bucket[i] = static_cast<int64_t>(bytes.random());
    for (const std::string& level : levels()) {
        set_level(level);
        const Answers answers(logits, batch, classes);
        watermark_mix(logits.source(), similarity.get(), bucket.get(), answers.mixing(targets, groups, rule, seed), 1);
        check_answers(logits, batch, classes, similarity.get(), targets, groups, rule, seed, bucket, answers,
                      level.c_str());
    }
}

// The three steps one after the other.
struct Steps {
    Exactly<float> similarity;
    Exactly<int64_t> bucket;
    Answers answers;

    Steps(const Rows& queries, const Rows& logits, const Sizes& sizes, size_t classes, const PackedBank& held,
          const Neighbours& neighbours, const Exactly<float>& planes, size_t n_planes, const SimilarityRule& rule,
          const Exactly<float>& targets, const MixingRule& mixing, uint64_t seed)
        : similarity(sizes.batch * sizes.groups), bucket(sizes.batch), answers(logits, sizes.batch, classes) {
        set_preselection(Preselection::kNever);
        const Distances found(queries, sizes.batch, held, neighbours);
        set_preselection(Preselection::kAlways);  // of the fused call that this is compared with
        const bool with_confidence = mixing.needs_confidence() || rule.confidence_weight != 0.0f;
        std::vector<float> wide(classes);
        for (size_t i = 0; i < sizes.batch; ++i) {
            const bool is_float = logits.dtype == DType::kFloat32;
            const Softmax of_row = kernels().softmax(
                {logits.row(i).data, logits.dtype, classes, with_confidence, is_float ? nullptr : wide.data()});
            const bool finite = of_row.finite && queries.finite(i);
            const float confidence = with_confidence && finite ? 1.0f / of_row.sum : 1.0f;
            for (size_t g = 0; g < sizes.groups; ++g) {
                const size_t at = i * sizes.groups + g;
                similarity[at] = finite ? baseline::similarity_of(found.distance[at], confidence, rule.offset[g],
                                                                  rule.scale[g], rule.confidence_weight)
                                        : 0.0f;
            }
        }
        sign_hash(queries.source(), planes.get(), n_planes, bucket.get(), 1);
        watermark_mix(logits.source(), similarity.get(), bucket.get(),
                      answers.mixing(targets, sizes.groups, mixing, seed), 1);
    }
};

void fuzz_watermark(Bytes& bytes) {
    const Sizes sizes(bytes);
    const size_t classes = bytes.size(1, 40), n_planes = bytes.size(1, 64);
    const Neighbours neighbours = neighbours_of(bytes, sizes.k);
    const MixingRule mixing = rule_of(bytes);
    const uint64_t seed = bytes.random();
    const PackedBank held(bytes, sizes.groups, sizes.rows, sizes.features);
    const Exactly<float> planes = finite_numbers(bytes, n_planes * sizes.features);
    const Exactly<float> targets = finite_numbers(bytes, sizes.groups * classes);
    const Rows queries(bytes, sizes.batch, sizes.features), logits(bytes, sizes.batch, classes);
    Exactly<float> offset(sizes.groups), scale(sizes.groups);
    const bool odd = bytes.byte() % 4 == 0;
    constexpr float weights[] = {0.0f, 0.0f, 0.3f, 2.0f};
    const float weight = weights[bytes.below(4)];
    set_level(levels().back());
    const Distances near(queries, sizes.batch, held, neighbours);
    for (size_t g = 0; g < sizes.groups; ++g) {
        // About as far as the queries are, so that both sides of the offset are met.
        const size_t query = sizes.batch == 0 ? 0 : bytes.below(sizes.batch);
        const float found = sizes.batch == 0 ? 1.0f : near.distance[query * sizes.groups + g];
        const float typical = std::isfinite(found) ? found : 1.0f;
        offset[g] = odd ? finite_numbers(bytes, 1)[0] : typical * (0.5f + static_cast<float>(bytes.uniform())) + weight;
        scale[g] = odd ? std::max(std::fabs(finite_numbers(bytes, 1)[0]), 0x1p-149f)
                       : std::max(typical * static_cast<float>(bytes.uniform()), 0x1p-149f);
    }
    const SimilarityRule rule{offset.get(), scale.get(), weight};
    for (const std::string& level : levels()) {
        set_level(level);
        const Steps steps(queries, logits, sizes, classes, held, neighbours, planes, n_planes, rule, targets, mixing,
                          seed);
        check_answers(logits, sizes.batch, classes, steps.similarity.get(), targets, sizes.groups, mixing, seed,
                      steps.bucket, steps.answers, level.c_str());
        for (const bool exhaustive : {true, false}) {
            set_exhaustive(exhaustive);
            forget_bounds();
            const Answers fused(logits, sizes.batch, classes);
            const Exactly<float> similarity(sizes.batch * sizes.groups);
            watermark(queries.source(), logits.source(), held.bank(), neighbours, planes.get(), n_planes, rule,
                      fused.mixing(targets, sizes.groups, mixing, seed), similarity.get(), 1);
            for (size_t i = 0; i < similarity.size(); ++i)
                REQUIRE(same_bits(similarity[i], steps.similarity[i]),
                        "%s, exhaustive %d: similarity %.9g, in steps %.9g", level.c_str(), exhaustive,
                        double{similarity[i]}, double{steps.similarity[i]});
            REQUIRE(fused.equals(steps.answers), "%s, exhaustive %d: fused and in steps differ", level.c_str(),
                    exhaustive);
        }
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Bytes bytes(data, size);
    switch (bytes.byte() % 5) {
        case 0: fuzz_hash(bytes); break;
        case 1: fuzz_mix(bytes); break;
        case 2: fuzz_distance(bytes); break;
        default: fuzz_watermark(bytes); break;
    }
    return 0;
}
