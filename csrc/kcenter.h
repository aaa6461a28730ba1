// Greedy k-center: which points a coreset consists of.
#pragma once

#include "common.h"

namespace spd {

constexpr int kcenter_block = 16;
constexpr int kcenter_largest_byte = 63;
constexpr int kcenter_group = 128;  // points of which one bound is kept
constexpr int kcenter_bytes = 64;   // a point's bytes are padded, with q = 0, to a multiple
// So many bytes of the picks are looked at first; their square is this where there is no pick yet.
constexpr int kcenter_first_bytes = 64, kcenter_no_pick = 1 << 30;

// What is known of a point in bytes, see bytes.h.
struct ByteInfo {
    float error;
    int32_t square;  // sum of the integers' squares
};

struct KCenter {
    const float* points;  // (n, d), d at most 65,536
    const float* origin;  // (d,) and `scale`: see bytes.h
    float scale;
    int64_t n, k;
    int d, bytes;    // of a point
    int64_t* picks;  // (k,), of which `done` are known; picks[0] is the start
    int64_t done;
    // Of groups of points: as large as the largest of their distances or larger.
    float* peaks;
    // Of the points, room for n of each. `distances` are squared, to the nearest pick or larger,
    // and negative for picks. The first `seen` picks are not nearer than that. Those before
    // `in_bytes` are not compared in bytes (again): they were too far, or probably are.
    float* distances;  // with room for whole groups
    int32_t* seen;
    int32_t* in_bytes;
    // A pick that is near, not always the nearest, and the start before any other. Points -1 and n
    // have one, too.
    int32_t* near_pick;
    uint8_t* point_bytes;  // times bytes
    ByteInfo* infos;
    float radius;  // of the last pick, squared: no distance is larger
    float step;    // by which share of it the next one is expected to be smaller
    // Of the picks, room for k rounded up to a whole block of each.
    int8_t* pick_bytes;  // times bytes
    int32_t* pick_squares;
    float* pick_errors;
    // The same of their first bytes alone, by which a pick is chosen that may be near.
    int8_t* pick_first_bytes;  // times kcenter_first_bytes
    int32_t* pick_first_squares;
    int64_t evaluations;  // of full distances
};

#define SPD_DECLARE_KCENTER(isa)                          \
    namespace isa {                                       \
    bool kcenter_begin(KCenter& state, float largest);    \
    void kcenter_advance(KCenter& state, int64_t picked); \
    }

}  // namespace spd
