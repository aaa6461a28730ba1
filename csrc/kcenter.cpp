// Greedy k-center without most of its distances. A point's distance to the picks is looked at only
// when the point is at the top of a heap of upper bounds, and then only to those picks that a lower
// bound from bytes does not rule out. The picks are those of the plain algorithm.

#include "kcenter.h"

#include <cfloat>

#include "bytes.h"

namespace spd {
namespace SPD_ISA {
namespace {

static_assert(kcenter_block == bound_block && kcenter_bytes % byte_step == 0 &&
                  kcenter_bytes % lanes == 0,
              "the header cannot include vectors.h");

bool comes_first(const Waiting& a, const Waiting& b) {
    return a.distance > b.distance || (a.distance == b.distance && a.point < b.point);
}

// Moves what is at `place` down to where it belongs.
void sift_down(Waiting* heap, int64_t size, int64_t place) {
    const Waiting moved = heap[place];
    for (int64_t child; (child = 2 * place + 1) < size; place = child) {
        if (child + 1 < size && comes_first(heap[child + 1], heap[child])) ++child;
        if (!comes_first(heap[child], moved)) break;
        heap[place] = heap[child];
    }
    heap[place] = moved;
}

void add_pick(KCenter& state, int64_t point) {
    const int64_t number = state.done++, first = number / bound_block * bound_block;
    state.picks[number] = point;
    put_in_block(state.pick_bytes + first * state.bytes, int(number - first),
                 state.point_bytes + point * state.bytes, state.bytes);
    state.pick_squares[number] = state.infos[point].square;
    state.pick_errors[number] = state.infos[point].error;
}

// Points come up in no order, so each would be waited for. GCC leaves out calls of a function that
// only fetches: it has to be inlined.
__attribute__((always_inline)) inline void fetch(const KCenter& state, int64_t point) {
    for (int c = 0; c < state.bytes; c += 64)
        __builtin_prefetch(state.point_bytes + point * state.bytes + c);
    for (int c = 0; c < state.d; c += 16)
        __builtin_prefetch(state.points + point * state.d + c, 0, 2);  // needed later, if at all
}

// Of the picks of a block whose bits are set, those that may be nearer than `distance`: integers
// of squared distance `squares`, errors of the picks and the point.
unsigned candidates(const Floats* squares, const float* errors, float error, float distance,
                    float scale, unsigned bits) {
    // Covers the rounding of dist2, and 1e-18 what stands above an underflow in a square.
    const float reach = (sqrtf(distance) * 1.0001f + 1e-18f) * scale + error;
    unsigned found = 0;
    for (int v = 0; v < block_vectors; ++v) {
        const Floats limit = load(errors + v * lanes) + reach;
        // FLT_MIN: also where all of it underflows; squares are whole numbers, so no other changes.
        found |= below(squares[v] - limit * limit, FLT_MIN) << v * lanes;
    }
    return found & bits;
}

int place_of_smallest(const Floats* squares, unsigned bits) {
    const float* values = reinterpret_cast<const float*>(squares);
    int place = __builtin_ctz(bits);
    for (bits &= bits - 1; bits; bits &= bits - 1)
        if (values[__builtin_ctz(bits)] < values[place]) place = __builtin_ctz(bits);
    return place;
}

// Compares a point with the picks that it has not seen, until it is nearer to one than `enough`.
void refresh(KCenter& state, Waiting& item, float enough) {
    const float* point = state.points + size_t(item.point) * state.d;
    const int8_t* bytes = state.point_bytes + size_t(item.point) * state.bytes;
    const ByteInfo info = state.infos[item.point];
    while (item.seen < state.done && item.distance >= enough) {
        const int64_t first = item.seen / bound_block * bound_block;
        const int64_t end = min2<int64_t>(first + bound_block, state.done);
        const float* errors = state.pick_errors + first;
        Floats squares[block_vectors];
        byte_distances(state.pick_bytes + first * state.bytes, state.pick_squares + first, bytes,
                       info, state.bytes, squares);
        unsigned bits = ~0u << (item.seen - first) & ((1u << (end - first)) - 1);
        item.seen = int32_t(end);
        bits = candidates(squares, errors, info.error, item.distance, state.scale, bits);
        while (bits) {
            const int place = place_of_smallest(squares, bits);  // may rule out the others
            const float* pick = state.points + state.picks[first + place] * state.d;
            const float distance = dist2(point, pick, state.d, item.distance);
            ++state.evaluations;
            bits &= ~(1u << place);
            if (distance >= item.distance) continue;
            item.distance = distance;
            bits = candidates(squares, errors, info.error, distance, state.scale, bits);
        }
    }
}

}  // namespace

void kcenter_begin(KCenter& state) {
    const int64_t start = state.picks[0];
    for (int64_t i = 0; i < state.n; ++i) {
        const float* point = state.points + i * state.d;
        int8_t* bytes = state.point_bytes + i * state.bytes;
        memset(bytes + state.bytes - kcenter_bytes, 0, kcenter_bytes);
        state.infos[i] = to_bytes(point, state.origin, state.scale, state.d, bytes);
        if (i != start)
            state.heap[state.waiting++] = {
                dist2(point, state.points + start * state.d, state.d, INFINITY), int32_t(i), 1};
    }
    state.evaluations = state.waiting;
    for (int64_t i = state.waiting / 2; i-- > 0;) sift_down(state.heap, state.waiting, i);
    add_pick(state, start);
}

void kcenter_advance(KCenter& state, int64_t picked) {
    Waiting* heap = state.heap;
    while (state.done < picked) {
        if (heap[0].seen == state.done) {
            add_pick(state, heap[0].point);
            heap[0] = heap[--state.waiting];
        } else {
            float second = -1;
            for (int64_t child = 1; child < min2<int64_t>(3, state.waiting); ++child) {
                second = max2(second, heap[child].distance);
                fetch(state, heap[child].point);  // one of them probably comes next
            }
            refresh(state, heap[0], second);
        }
        if (state.waiting) sift_down(heap, state.waiting, 0);
    }
}

}  // namespace SPD_ISA
}  // namespace spd
