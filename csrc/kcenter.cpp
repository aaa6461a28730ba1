// Greedy k-center without most of its distances. A point's distance to the picks is looked at only
// when the point is at the top of a heap of upper bounds, and then only to those picks that a lower
// bound in a few coordinates does not rule out. The picks are those of the plain algorithm.

#include "kcenter.h"

#include "dist2.h"

namespace spd {
namespace SPD_ISA {
namespace {

static_assert(kcenter_block == bound_block, "the header cannot include vectors.h");

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

void add_bounds_of_pick(KCenter& state, int64_t number) {
    const float* bounds = state.bounds + state.picks[number] * kcenter_bounds;
    float* block = state.pick_bounds + number / bound_block * bound_block * kcenter_bounds;
    for (int c = 0; c < kcenter_bounds; ++c)
        block[c * bound_block + number % bound_block] = bounds[c];
}

// Points come up in no order, so each would be waited for. GCC leaves out calls of a function that
// only fetches: it has to be inlined.
__attribute__((always_inline)) inline void fetch(const KCenter& state, int64_t point) {
    constexpr int line = 16;
    const float* bounds = state.bounds + point * kcenter_bounds;
    for (int c = 0; c < kcenter_bounds; c += line) __builtin_prefetch(bounds + c);
    for (int c = 0; c < state.d; c += line)
        __builtin_prefetch(state.points + point * state.d + c, 0, 2);  // needed later, if at all
}

// Of the picks of a block whose bits are set, those whose bound is below `limit`. The first
// coordinates, along which points differ most, already rule out most of the others.
unsigned candidates(const float* block, const float* bounds, float limit, unsigned bits) {
    constexpr int step = 16;
    static_assert(kcenter_bounds % step == 0);
    Floats lower[block_vectors] = {};
    for (int c = 0; c < kcenter_bounds && bits; c += step) {
        Floats more[block_vectors];
        bound_distances<1>(block + c * bound_block, bounds + c, step, more);
        unsigned below_limit = 0;
        for (int v = 0; v < block_vectors; ++v) {
            lower[v] += more[v];
            below_limit |= below(lower[v], limit) << v * lanes;
        }
        bits &= below_limit;
    }
    return bits;
}

// Compares a point with the picks that it has not seen, until it is nearer to one than `enough`.
void refresh(KCenter& state, Waiting& item, float enough) {
    const float* point = state.points + size_t(item.point) * state.d;
    const float* bounds = state.bounds + size_t(item.point) * kcenter_bounds;
    float limit = widened(item.distance, state.slack);
    while (item.seen < state.done) {
        const int64_t first = item.seen / bound_block * bound_block;
        const int64_t end = min2<int64_t>(first + bound_block, state.done);
        const unsigned unseen = ~0u << (item.seen - first) & ((1u << (end - first)) - 1);
        unsigned bits =
            candidates(state.pick_bounds + first * kcenter_bounds, bounds, limit, unseen);
        item.seen = int32_t(end);
        for (; bits; bits &= bits - 1) {
            const int64_t pick = first + __builtin_ctz(bits);
            const float* other = state.points + state.picks[pick] * state.d;
            const float distance = dist2(point, other, state.d, item.distance);
            ++state.evaluations;
            if (distance >= item.distance) continue;
            item.distance = distance;
            if (distance < enough) {
                item.seen = int32_t(pick + 1);
                return;
            }
            limit = widened(distance, state.slack);
        }
    }
}

}  // namespace

void kcenter_begin(KCenter& state) {
    const float* start = state.points + state.picks[0] * state.d;
    state.waiting = 0;
    for (int64_t i = 0; i < state.n; ++i)
        if (i != state.picks[0])
            state.heap[state.waiting++] = {
                dist2(state.points + i * state.d, start, state.d, INFINITY), int32_t(i), 1};
    state.evaluations = state.waiting;
    for (int64_t i = state.waiting / 2; i-- > 0;) sift_down(state.heap, state.waiting, i);
    add_bounds_of_pick(state, 0);
    state.done = 1;
}

void kcenter_advance(KCenter& state, int64_t picked) {
    Waiting* heap = state.heap;
    while (state.done < picked) {
        if (heap[0].seen == state.done) {
            state.picks[state.done] = heap[0].point;
            add_bounds_of_pick(state, state.done++);
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
