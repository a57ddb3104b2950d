// Several callers on the core at once, for the thread sanitizer: they share a bank, the pool, the memory of what bounds
// were worth, the choice of the level and the counters, as the threads of a server do. Every answer must be, bit for
// bit, the one that a single thread gives. Another thread turns
// the switches that must change time alone; then the level changes under running calls.
//
// race_core [seed] [seconds]
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "bytes.h"
#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "cpu/pool.h"

using namespace honeytrace;

namespace {

constexpr size_t kCallers = 4, kThreads = 3, kClasses = 11, kPlanes = 17;

// Large enough that calls are split over the pool's threads (cpu/ops.cpp: a quarter million multiply-adds each).
struct Problem {
    size_t batch, groups, rows, features, k;
    Metric metric;
    std::vector<float> queries, logits, packed, norms, planes, targets, offset, scale;
    MixingRule rule{0.3, 0.5, 0.9, 2.0, 1, 0.4, 1.0, 2.0, 10};

    Problem(uint64_t seed, size_t batch_, size_t features_, Metric metric_)
        : batch(batch_), groups(2), rows(120), features(features_), k(7), metric(metric_) {
        fuzz::Bytes bytes(reinterpret_cast<const uint8_t*>(&seed), sizeof seed);
        const auto fill = [&](size_t size) {
            std::vector<float> out(size);
            for (float& value : out) value = fuzz::number(bytes, fuzz::Kind::kOrdinary);
            return out;
        };
        const size_t panels = (rows + kLanes - 1) / kLanes;
        const std::vector<float> bank = fill(groups * rows * features);
        queries = fill(batch * features);
        std::copy(bank.begin(), bank.begin() + static_cast<long>(features * (batch / 4)), queries.begin());
        logits = fill(batch * kClasses);
        planes = fill(kPlanes * features);
        targets = fill(groups * kClasses);
        packed.resize(Bank{nullptr, nullptr, groups, rows, features}.packed_floats());
        norms.resize(groups * panels * kLanes);
        pack_bank(bank.data(), groups, rows, features, packed.data(), norms.data());
        // About the median distance of these queries.
        std::vector<float> found(batch * groups);
        feature_distance(source(queries, features), bank_of(), {k, metric, 2.5}, found.data(), nullptr, 1);
        offset.assign(groups, found[found.size() / 2]);
        scale.assign(groups, found[found.size() / 2] * 0.3f + 0.01f);
    }
    RowSource source(const std::vector<float>& values, size_t columns) const {
        return {values.data(), DType::kFloat32, batch, columns, columns};
    }
    Bank bank_of() const { return {packed.data(), norms.data(), groups, rows, features}; }
};

// Bytes of everything the core gives for a problem.
std::vector<char> everything(const Problem& problem, size_t threads) {
    const size_t batch = problem.batch;
    std::vector<float> distance(batch * problem.groups), similarity(batch * problem.groups), out(batch * kClasses);
    std::vector<int32_t> index(batch * problem.groups * problem.k);
    std::vector<int64_t> bucket(batch), group(batch);
    const std::unique_ptr<bool[]> flipped(new bool[batch]());
    const Neighbours neighbours{problem.k, problem.metric, 2.5};
    const RowSource queries = problem.source(problem.queries, problem.features);
    const RowSource logits = problem.source(problem.logits, kClasses);
    const Mixing mixing{problem.targets.data(), problem.groups, problem.rule, 42, out.data(),
                        group.data(),           flipped.get()};
    feature_distance(queries, problem.bank_of(), neighbours, distance.data(), index.data(), threads);
    sign_hash(queries, problem.planes.data(), kPlanes, bucket.data(), threads);
    watermark(queries, logits, problem.bank_of(), neighbours, problem.planes.data(), kPlanes,
              {problem.offset.data(), problem.scale.data(), 0.1f}, mixing, similarity.data(), threads);
    std::vector<char> bytes;
    const auto put = [&](const void* data, size_t size) {
        bytes.insert(bytes.end(), static_cast<const char*>(data), static_cast<const char*>(data) + size);
    };
    put(distance.data(), distance.size() * 4);
    put(index.data(), index.size() * 4);
    put(bucket.data(), bucket.size() * 8);
    put(similarity.data(), similarity.size() * 4);
    put(out.data(), out.size() * 4);
    put(group.data(), group.size() * 8);
    put(flipped.get(), batch);
    watermark_mix(logits, similarity.data(), bucket.data(), mixing, threads);
    put(out.data(), out.size() * 4);
    return bytes;
}

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "race_core: %s\n", what);
    std::abort();
}

// Callers at work for so many seconds, and one more thread that meddles; returns how often body was called.
size_t run_for(double seconds, const std::function<void(size_t)>& body, const std::function<void(size_t)>& meddle,
               size_t* changes) {
    std::atomic<bool> stop{false};
    std::atomic<size_t> calls{0};
    std::vector<std::thread> threads;
    for (size_t caller = 0; caller < kCallers; ++caller) {
        threads.emplace_back([&, caller] {
            for (size_t i = caller; !stop.load(); ++i, calls.fetch_add(1)) body(i);
        });
    }
    const auto start = std::chrono::steady_clock::now();
    while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
        meddle((*changes)++);
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    stop.store(true);
    for (std::thread& thread : threads) thread.join();
    return calls.load();
}

// Does a call's exception reach its caller, and only that one, while others use the pool?
void throw_in_the_pool() {
    try {
        parallel_for(20, kThreads, [](size_t item) {
            if (item == 13) throw std::runtime_error("13");
        });
    } catch (const std::runtime_error&) {
        return;
    }
    fail("an exception was lost");
}

}  // namespace

int main(int argc, char** argv) {
    const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
    const double seconds = argc > 2 ? std::strtod(argv[2], nullptr) : 4;

    // The very first calls of the process, all at once: choosing the level, and making the pool.
    const auto together = [](size_t count, const std::function<void(size_t)>& body) {
        std::vector<std::thread> threads;
        for (size_t i = 0; i < count; ++i) threads.emplace_back(body, i);
        for (std::thread& thread : threads) thread.join();
    };
    together(kCallers, [](size_t) {
        kernels();
        throw_in_the_pool();
    });

    std::vector<Problem> problems;
    for (const auto& [batch, features, metric] :
         {std::tuple{70u, 33u, Metric::kL1}, std::tuple{40u, 65u, Metric::kCosine}, std::tuple{9u, 300u, Metric::kLp}})
        problems.emplace_back(seed + batch, batch, features, metric);

    size_t calls = 0, changes = 0;
    const double share = seconds / static_cast<double>(usable_levels().size() + 1);
    for (const std::string& level : usable_levels()) {
        set_level(level);
        std::vector<std::vector<char>> expected;
        for (const Problem& problem : problems) expected.push_back(everything(problem, 1));
        calls += run_for(
            share,
            [&](size_t i) {
                if (i % 16 == 0) throw_in_the_pool();
                if (everything(problems[i % 3], 1 + i / 3 % kThreads) != expected[i % 3])
                    fail("callers disturb one another");
            },
            [&](size_t i) {
                // What must change time alone.
                set_exhaustive(i % 2 == 0);
                forget_bounds();
                if (bounded_counts().finished == 0 && pool_workers() > kThreads)
                    fail("more workers than were asked for");
            },
            &changes);
    }
    // A call in which the level changes gives bits of either, so nothing is compared.
    calls += run_for(
        share, [&](size_t i) { everything(problems[i % 3], kThreads); },
        [&](size_t i) { set_level(usable_levels()[i % usable_levels().size()]); }, &changes);
    std::printf("calls %zu from %zu threads, changes %zu, workers %zu, seed %llu\n", calls, kCallers, changes,
                pool_workers(), static_cast<unsigned long long>(seed));
    if (calls < kCallers || pool_workers() == 0) fail("too little has run to show anything");
}
