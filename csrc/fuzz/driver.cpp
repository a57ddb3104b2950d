// A main for LLVMFuzzerTestOneInput where there is no libFuzzer: the kept inputs, each as it is, then mutations of them
// and fresh ones from a seed. No coverage guides it; what libFuzzer found worth keeping does.
//
// driver [corpus.hex] [seed] [seconds] [most executions]
#include <sanitizer/common_interface_defs.h>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Input = std::vector<uint8_t>;

Input running;  // the input in progress, to be shown when it aborts

void show() {
    std::fprintf(stderr, "input: ");
    for (uint8_t byte : running) std::fprintf(stderr, "%02x", byte);
    std::fprintf(stderr, "\n");
}

void run(const Input& input) {
    running = input;
    // A copy on the heap, exactly as large, so that reading beyond it is found.
    const Input exact(input);
    LLVMFuzzerTestOneInput(exact.data(), exact.size());
}

std::vector<Input> read_corpus(const char* path) {
    std::vector<Input> inputs;
    std::ifstream file(path);
    if (!file) {
        std::fprintf(stderr, "no corpus at %s\n", path);
        std::exit(2);
    }
    for (std::string line; std::getline(file, line);) {
        Input input;
        for (size_t i = 0; i + 1 < line.size(); i += 2)
            input.push_back(static_cast<uint8_t>(std::stoi(line.substr(i, 2), nullptr, 16)));
        inputs.push_back(input);
    }
    return inputs;
}

struct Random {
    uint64_t state;
    uint64_t next() {
        state ^= state << 13;
        state ^= state >> 7;
        return state ^= state << 17;
    }
    size_t below(size_t limit) { return static_cast<size_t>(next() % limit); }
};

Input mutated(const std::vector<Input>& corpus, Random& random) {
    Input out;
    if (!corpus.empty() && random.below(8) != 0) out = corpus[random.below(corpus.size())];
    for (size_t edits = 1 + random.below(4); edits > 0; --edits) {
        const auto byte = static_cast<uint8_t>(random.next());
        const size_t at = random.below(out.size() + 1);
        if (at == out.size() || random.below(4) == 0)
            out.insert(out.begin() + static_cast<std::ptrdiff_t>(at), byte);
        else if (random.below(4) == 0)
            out.erase(out.begin() + static_cast<std::ptrdiff_t>(at));
        else
            out[at] = byte;
    }
    return out;
}

}  // namespace

int main(int argc, char** argv) {
    const std::vector<Input> corpus = argc > 1 ? read_corpus(argv[1]) : std::vector<Input>{};
    const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
    const double seconds = argc > 3 ? std::strtod(argv[3], nullptr) : 5;
    const size_t most = argc > 4 ? std::strtoull(argv[4], nullptr, 10) : SIZE_MAX;
    __sanitizer_set_death_callback(show);
    std::signal(SIGABRT, [](int) { show(); });
    const auto start = std::chrono::steady_clock::now();
    const auto late = [&] {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds;
    };
    size_t executions = 0;
    for (const Input& input : corpus) {
        run(input);
        ++executions;
    }
    Random random{seed * 0x9e3779b97f4a7c15u + 1};
    for (; executions < most && !late(); ++executions) run(mutated(corpus, random));
    std::printf("executions %zu, corpus %zu, seed %llu\n", executions, corpus.size(),
                static_cast<unsigned long long>(seed));
}
