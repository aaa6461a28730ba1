// Nearest neighbours in a bank of points, exact.
#pragma once

#include "common.h"

namespace spd {

constexpr int nearest_block = 16;

struct NearestArgs {
    const float* queries;       // (q, d)
    const float* bank;          // (n, d)
    const float* query_bounds;  // (q, coordinates), see dist2.h
    const float* bank_bounds;   // (n / nearest_block rounded up, coordinates, nearest_block)
    int64_t n;
    int d, coordinates, k;
    float slack;       // what rounding can add to the distance of bound coordinates
    float* distances;  // (q, k) squared, the nearest first, of equals the lowest index
    int64_t* indices;  // (q, k)
};

// Queries begin..end. Returns false if there is no memory.
#define SPD_DECLARE_NEAREST(isa)                                                 \
    namespace isa {                                                              \
    bool nearest_neighbors(const NearestArgs& args, int64_t begin, int64_t end); \
    }

}  // namespace spd
