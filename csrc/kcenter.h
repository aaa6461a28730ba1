// Greedy k-center: which points a coreset consists of.
#pragma once

#include "common.h"

namespace spd {

constexpr int kcenter_bounds = 64;  // bound coordinates, see dist2.h
constexpr int kcenter_block = 16;

// A point that is not picked yet. `distance` is the smallest squared distance to the first `seen`
// picks, so it can only be too large.
struct Waiting {
    float distance;
    int32_t point, seen;
};

struct KCenter {
    const float* points;  // (n, d)
    const float* bounds;  // (n, kcenter_bounds)
    int64_t n, k;
    int d;           // a multiple of 32
    float slack;     // what rounding can add to the distance of bound coordinates
    int64_t* picks;  // (k,), of which `done` are known; picks[0] is the start
    int64_t done;
    Waiting* heap;        // room for n; the farthest first, of equals the lowest point
    int64_t waiting;      // in the heap
    float* pick_bounds;   // room for k rounded up to a whole block, times kcenter_bounds
    int64_t evaluations;  // of full distances
};

#define SPD_DECLARE_KCENTER(isa)                          \
    namespace isa {                                       \
    void kcenter_begin(KCenter& state);                   \
    void kcenter_advance(KCenter& state, int64_t picked); \
    }

}  // namespace spd
