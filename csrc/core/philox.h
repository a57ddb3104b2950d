// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw,
// "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3 and table 2.
// One call turns a counter and a key into four words; there is no state to share between replicas.
#pragma once

#include <cstdint>

#include "hd.h"

namespace honeytrace::HONEYTRACE_LEVEL {

struct PhiloxWords {
    uint32_t word[4];
};

HONEYTRACE_HD PhiloxWords philox4x32_10(PhiloxWords counter, uint32_t key0, uint32_t key1) {
    constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
    constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{kMultiplier0} * counter.word[0];
        const uint64_t product1 = uint64_t{kMultiplier1} * counter.word[2];
        counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(product1),
                    static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(product0)}};
        key0 += kWeyl0;
        key1 += kWeyl1;
    }
    return counter;
}

// The uniform number in [0, 1) that decides the flip of one query's bucket in one group.
HONEYTRACE_HD double flip_uniform(uint64_t seed, uint64_t bucket, uint32_t group) {
    const PhiloxWords counter{{static_cast<uint32_t>(bucket), static_cast<uint32_t>(bucket >> 32), group, 0u}};
    const PhiloxWords out = philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    return out.word[0] * 0x1p-32;
}

}  // namespace honeytrace::HONEYTRACE_LEVEL
