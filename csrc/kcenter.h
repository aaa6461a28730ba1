// Greedy k-center: which points a coreset consists of.
#pragma once

#include "common.h"

namespace spd {

constexpr int kcenter_block = 16;
constexpr int kcenter_largest_byte = 63;
constexpr int kcenter_bytes = 32;  // a point's bytes are padded with zeros to a multiple of it

// What is known of a point in bytes, see bytes.h.
struct ByteInfo {
    float error;
    int32_t square;  // sum of the integers' squares
    int32_t excess;  // 64 times their sum
};

// A point that is not picked yet. `distance` is the smallest squared distance to the first `seen`
// picks, so it can only be too large.
struct Waiting {
    float distance;
    int32_t point, seen;
};

struct KCenter {
    const float* points;  // (n, d), d at most 65,536
    const float* origin;  // (d,) and `scale`: see bytes.h
    float scale;
    int64_t n, k;
    int d, bytes;    // of a point
    int64_t* picks;  // (k,), of which `done` are known; picks[0] is the start
    int64_t done;
    Waiting* heap;        // room for n; the farthest first, of equals the lowest point
    int64_t waiting;      // in the heap
    int8_t* point_bytes;  // room for n * bytes
    ByteInfo* infos;      // room for n
    // Of the picks, room for k rounded up to a whole block of each.
    uint8_t* pick_bytes;  // times bytes
    int32_t* pick_squares;
    float* pick_errors;
    int64_t evaluations;  // of full distances
};

#define SPD_DECLARE_KCENTER(isa)                          \
    namespace isa {                                       \
    void kcenter_begin(KCenter& state);                   \
    void kcenter_advance(KCenter& state, int64_t picked); \
    }

}  // namespace spd
