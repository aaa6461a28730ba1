// Counter-based random numbers, the same as numpy's Philox bit generator.
#pragma once

#include "common.h"

namespace spd {

// One block of Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
static inline void philox(const uint64_t* counter, uint64_t key0, uint64_t key1, uint64_t* out) {
    uint64_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    for (int round = 0; round < 10; ++round) {
        const auto a = static_cast<unsigned __int128>(0xD2E7470EE14C6C93) * c0;
        const auto b = static_cast<unsigned __int128>(0xCA5A826395121157) * c2;
        c0 = uint64_t(b >> 64) ^ c1 ^ key0;
        c1 = uint64_t(b);
        c2 = uint64_t(a >> 64) ^ c3 ^ key1;
        c3 = uint64_t(a);
        key0 += 0x9E3779B97F4A7C15;
        key1 += 0xBB67AE8584CAA73B;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// The `block`th four numbers in [0, 1) of the stream with key (seed, 0). numpy counts up before it
// draws, and takes the upper 53 bits.
static inline void uniform_block(const uint64_t* counter, uint64_t block, uint64_t seed,
                                 double* out) {
    const uint64_t at[4] = {counter[0] + block + 1, counter[1], counter[2], counter[3]};
    uint64_t bits[4];
    philox(at, seed, 0, bits);
    for (int k = 0; k < 4; ++k) out[k] = double(bits[k] >> 11) * 0x1p-53;
}

}  // namespace spd
