#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace honeytrace {

namespace scalar {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kKernels;
}
#endif

namespace {

struct Level {
    const Kernels* kernels;
    bool (*runs_here)();
};

bool always() { return true; }

#if defined(__x86_64__)
// cpuid says what the processor has; xgetbv says which registers the operating system saves.
struct Features {
    bool avx2 = false, avx512 = false;

    Features() {
        unsigned a = 0, b = 0, c = 0, d = 0;
        if (!__get_cpuid(1, &a, &b, &c, &d)) return;
        const bool saves_state = c & (1u << 27);
        const bool fma = c & (1u << 12), f16c = c & (1u << 29);
        if (!saves_state || !fma || !f16c) return;
        unsigned low = 0, high = 0;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        avx2 = (low & 0x06u) == 0x06u && (b & (1u << 5));
        const unsigned f_dq_bw_vl = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);
        avx512 = avx2 && (low & 0xE6u) == 0xE6u && (b & f_dq_bw_vl) == f_dq_bw_vl;
    }
};
const Features& features() {
    static const Features found;
    return found;
}
bool has_avx2() { return features().avx2; }
bool has_avx512() { return features().avx512; }
#endif

const std::vector<Level>& levels() {
    static const std::vector<Level> all = {
        {&scalar::kKernels, always},
#if defined(__x86_64__)
        {&avx2::kKernels, has_avx2},
        {&avx512::kKernels, has_avx512},
#elif defined(__aarch64__)
        {&neon::kKernels, always},
#endif
    };
    return all;
}

const Kernels* find_level(const std::string& name, const char* argument) {
    std::string usable;
    for (const Level& level : levels()) {
        if (!level.runs_here()) continue;
        if (name == level.kernels->name) return level.kernels;
        usable += (usable.empty() ? "" : ", ") + std::string(level.kernels->name);
    }
    throw std::invalid_argument(std::string(argument) +
                                " must be one of the levels this build and this machine can run (" + usable +
                                "), got '" + name + "'");
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

std::vector<std::string> compiled_levels() {
    std::vector<std::string> names;
    for (const Level& level : levels()) names.emplace_back(level.kernels->name);
    return names;
}

std::vector<std::string> usable_levels() {
    std::vector<std::string> names;
    for (const Level& level : levels())
        if (level.runs_here()) names.emplace_back(level.kernels->name);
    return names;
}

const Kernels& kernels() {
    const Kernels* in_use = current.load(std::memory_order_acquire);
    if (in_use == nullptr) {
        const char* wanted = std::getenv("HONEYTRACE_SIMD");
        const std::string name = wanted != nullptr && *wanted != '\0' ? wanted : usable_levels().back();
        const Kernels* found = find_level(name, "HONEYTRACE_SIMD");
        // Another thread may have been first, or set_level called meanwhile; then theirs stays.
        if (current.compare_exchange_strong(in_use, found)) in_use = found;
    }
    return *in_use;
}

void set_level(const std::string& name) { current.store(find_level(name, "name"), std::memory_order_release); }

}  // namespace honeytrace
