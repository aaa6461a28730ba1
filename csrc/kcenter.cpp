// Greedy k-center without most of its distances. Of a point, only an upper bound of the distance to
// the nearest pick is kept. For the next pick, points are looked at whose bounds are beyond a limit
// that it probably exceeds. For most of them bytes tell that there is a pick within the limit, and
// only of the others distances are computed. The picks are those of the plain algorithm.

#include "kcenter.h"

#include <cfloat>

#include "bytes.h"

namespace spd {
namespace SPD_ISA {
namespace {

static_assert(kcenter_block == bound_block && kcenter_bytes % byte_step == 0 &&
                  kcenter_bytes % (4 * lanes) == 0 && kcenter_group % lanes == 0 &&
                  kcenter_first_bytes <= kcenter_bytes && kcenter_first_bytes % byte_step == 0,
              "the header cannot include vectors.h");

// So many points are looked at together: their bytes stay in the first cache while blocks of picks
// pass. The first piece is smaller, as where many are equally far all of it is looked at in vain.
constexpr int piece = 64, first_piece = 16;
// From so many picks on, coming up again costs a point more than the distance to a pick near it,
// which is smaller than the bound that bytes give. (Measured on patches of a trained network: 256
// to 1,024 are alike.)
constexpr int many_picks = 512;
// With fewer picks to be seen, looking for the likeliest one takes as long as looking at all.
constexpr int64_t many_unseen = 64;

void add_pick(KCenter& state, int64_t point) {
    const int64_t number = state.done++, block = number / bound_block * bound_block;
    const int place = int(number - block);
    const uint8_t* bytes = state.point_bytes + point * state.bytes;
    state.picks[number] = point;
    const int32_t excess =
        put_in_block(state.pick_bytes + block * state.bytes, place, bytes, state.bytes);
    state.pick_squares[number] = state.infos[point].square + 2 * excess;
    state.pick_errors[number] = state.infos[point].error;
    int32_t square = 2 * put_in_block(state.pick_first_bytes + block * kcenter_first_bytes, place,
                                      bytes, kcenter_first_bytes);
    for (int c = 0; c < kcenter_first_bytes; ++c)
        square += (bytes[c] - made_positive) * (bytes[c] - made_positive);
    state.pick_first_squares[number] = square;
    state.distances[point] = -1;
    state.near_pick[point] = int32_t(number);
}

// GCC leaves out calls of a function that only fetches: it has to be inlined.
__attribute__((always_inline)) inline void fetch(const void* start, int64_t size) {
    for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(static_cast<const char*>(start) + i);
}

// Of the picks of a block whose bits are set, those that may be nearer than `distance`: integers
// of squared distance `squares`, errors of the picks and the point.
unsigned candidates(const Floats* squares, const float* errors, float error, float distance,
                    float scale, unsigned bits) {
    // Covers the rounding of dist2, and 1e-16 what of it squares leave out that underflow, or are
    // flushed to zero, in 65,536 coordinates.
    const float reach = (sqrtf(distance) * 1.0001f + 1e-16f) * scale + error;
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

// NaN is not.
bool all_within(const float* point, int d, float largest) {
    unsigned beyond = 0;
    for (int c = 0; c < d; c += lanes) {
        const Ints size = (Ints)load_first(point + c, d - c) & 0x7fffffff;
        beyond |= below(Floats{} + largest, (Floats)size);
    }
    return !beyond;
}

float largest_of_group(const float* distances) {
    Floats largest = load(distances);
    for (int i = lanes; i < kcenter_group; i += lanes)
        largest = larger(largest, load(distances + i));
    float found = largest[0];
    for (int i = 1; i < lanes; ++i) found = max2(found, largest[i]);
    return found;
}

// The next points whose bounds are beyond the limit, at most so many of them. Their bytes are asked
// for.
int collect(KCenter& state, float limit, int64_t& next, int32_t* points, int most) {
    int count = 0;
    while (next < state.n && count <= most - lanes) {
        const float* distances = state.distances + next;
        if (next % kcenter_group == 0) {
            float& peak = state.peaks[next / kcenter_group];
            if (peak > limit) peak = largest_of_group(distances);
            if (peak <= limit) {
                next += kcenter_group;
                continue;
            }
        }
        for (unsigned bits = below(Floats{} + limit, load(distances)); bits; bits &= bits - 1) {
            const size_t point = next + __builtin_ctz(bits);
            fetch(state.point_bytes + point * state.bytes, state.bytes);
            points[count++] = int32_t(point);
        }
        next += lanes;
    }
    return count;
}

// The squared distance in integers, the pick's squared error included, below which a pick is
// probably within the limit of a point. In many dimensions what is left over is nearly orthogonal
// to the rest: the sum of squares is close to the squared distance. Where it is not, that costs
// time, but no bound is wrong.
float likely_limit(const KCenter& state, size_t point, float limit) {
    const float error = state.infos[point].error;
    return limit * state.scale * state.scale - error * error;
}

// Lowers a point's bound by a pick: to what `square`, their squared distance in integers, tells, or
// where there are many to their distance.
void bring_nearer(KCenter& state, size_t point, int64_t number, float square) {
    state.near_pick[point] = int32_t(number);
    float& distance = state.distances[point];
    if (state.done < many_picks) {
        // 1e-16 covers what of an error underflowed when it was squared; for the rest see
        // `candidates`.
        const float errors = state.pick_errors[number] + state.infos[point].error + 1e-16f;
        const float length = (sqrtf(square) + errors) * 1.0001f / state.scale;
        distance = min2(distance, length * length + FLT_MIN);
    } else {
        const float* pick = state.points + state.picks[number] * state.d;
        const float* own = state.points + point * state.d;
        distance = min2(distance, dist2(own, pick, state.d, distance));
        ++state.evaluations;
    }
}

// Whether a pick brings a point within the limit.
bool brings_within(KCenter& state, float limit, size_t point, int64_t number) {
    const float error = state.pick_errors[number];
    const uint8_t* pick = state.point_bytes + state.picks[number] * state.bytes;
    const float square =
        float(byte_distance(state.point_bytes + point * state.bytes, pick, state.bytes));
    if (square + error * error >= likely_limit(state, point, limit)) return false;
    bring_nearer(state, point, number, square);
    if (state.distances[point] > limit) return false;
    // As if it had been compared with all of them, as most are farther. What was really compared
    // is in `seen`.
    state.in_bytes[point] = int32_t(state.done);
    return true;
}

// Keeps those of the points that no pick to which a neighbour is near brings within the limit.
// Neighbours are patches beside each other in an image.
int beyond_the_neighbours(KCenter& state, float limit, int32_t* points, int count) {
    int kept = 0;
    for (int i = 0; i < count; ++i) {
        const int64_t point = points[i];
        bool within = false;
        for (int side = -1; side <= 1 && !within; side += 2) {
            const int32_t number = state.near_pick[point + side];
            if (number >= state.in_bytes[point])
                within = brings_within(state, limit, point, number);
        }
        points[kept] = int32_t(point);
        kept += !within;
    }
    return kept;
}

// The pick that is nearest by the first bytes, from the block of number `begin` on; many_unseen are
// more than a block, so in every place there is one.
int64_t nearest_by_first_bytes(const KCenter& state, size_t point, int64_t begin) {
    const uint8_t* bytes = state.point_bytes + point * state.bytes;
    Floats smallest[block_vectors];
    Ints block_of[block_vectors] = {};
    for (Floats& s : smallest) s = Floats{} + FLT_MAX;
    for (int64_t block = begin / bound_block * bound_block; block < state.done;
         block += bound_block) {
        Floats squares[block_vectors];
        block_byte_distances(state.pick_first_bytes + block * kcenter_first_bytes,
                             state.pick_first_squares + block, bytes, 0, kcenter_first_bytes,
                             squares);
        for (int v = 0; v < block_vectors; ++v) {
            const Ints nearer = squares[v] < smallest[v];
            smallest[v] = nearer ? squares[v] : smallest[v];
            block_of[v] = nearer ? Ints{} + int32_t(block) : block_of[v];
        }
    }
    const int place = place_of_smallest(smallest, (1u << bound_block) - 1);
    return reinterpret_cast<const int32_t*>(block_of)[place] + place;
}

// Keeps those of the points that the one pick which is nearest by the first bytes does not bring
// within the limit: of patches, for more than half of them that saves looking at the others.
int beyond_the_likeliest(KCenter& state, float limit, int32_t* points, int count) {
    int64_t likeliest[piece];  // or -1; all are known, and asked for, before any is compared
    for (int i = 0; i < count; ++i) {
        const int64_t begin = state.in_bytes[points[i]];
        likeliest[i] = -1;
        if (state.done - begin < many_unseen) continue;
        likeliest[i] = nearest_by_first_bytes(state, points[i], begin);
        fetch(state.point_bytes + state.picks[likeliest[i]] * state.bytes, state.bytes);
    }
    int kept = 0;
    for (int i = 0; i < count; ++i) {
        const int32_t point = points[i];
        points[kept] = point;
        kept += likeliest[i] < 0 || !brings_within(state, limit, point, likeliest[i]);
    }
    return kept;
}

// Keeps those of the points that no pick of the block from number `first` on brings within the
// limit.
int still_beyond(KCenter& state, int64_t first, float limit, int32_t* points, int count) {
    const int64_t end = min2<int64_t>(first + bound_block, state.done);
    for (int i = 0; i < count; ++i) {
        const size_t point = points[i];
        if (state.in_bytes[point] >= end) continue;
        Floats squares[block_vectors];
        block_byte_distances(state.pick_bytes + first * state.bytes, state.pick_squares + first,
                             state.point_bytes + point * state.bytes, state.infos[point].square,
                             state.bytes, squares);
        state.in_bytes[point] = int32_t(end);
        const float likely = likely_limit(state, point, limit);
        unsigned bits = 0;
        for (int v = 0; v < block_vectors; ++v) {
            const Floats error = load(state.pick_errors + first + v * lanes);
            bits |= below(squares[v] + error * error, likely) << v * lanes;
        }
        if (!(bits &= (1u << (end - first)) - 1)) continue;
        const int place = place_of_smallest(squares, bits);
        bring_nearer(state, point, first + place, reinterpret_cast<const float*>(squares)[place]);
    }
    int kept = 0;
    for (int i = 0; i < count; ++i) {
        points[kept] = points[i];
        kept += state.distances[points[i]] > limit;
    }
    return kept;
}

// Compares a point with the picks that it has not seen, until one is within the limit; if none is,
// its bound is its distance.
void compare(KCenter& state, size_t point, float limit) {
    const float* own = state.points + point * state.d;
    const uint8_t* bytes = state.point_bytes + point * state.bytes;
    const ByteInfo info = state.infos[point];
    float smallest = state.distances[point];
    int64_t seen = state.seen[point];
    // Bytes told that a pick is near: the distance to it may be enough. Later it is known already.
    if (smallest > limit && state.done < many_picks) {
        const float* pick = state.points + state.picks[state.near_pick[point]] * state.d;
        smallest = min2(smallest, dist2(own, pick, state.d, smallest));
        ++state.evaluations;
    }
    while (seen < state.done && smallest > max2(limit, 0.f)) {
        const int64_t first = seen / bound_block * bound_block;
        const int64_t end = min2<int64_t>(first + bound_block, state.done);
        const float* errors = state.pick_errors + first;
        Floats squares[block_vectors];
        block_byte_distances(state.pick_bytes + first * state.bytes, state.pick_squares + first,
                             bytes, info.square, state.bytes, squares);
        unsigned bits = ~0u << (seen - first) & ((1u << (end - first)) - 1);
        seen = end;
        bits = candidates(squares, errors, info.error, smallest, state.scale, bits);
        while (bits) {
            const int place = place_of_smallest(squares, bits);  // may rule out the others
            const float* pick = state.points + state.picks[first + place] * state.d;
            const float distance = dist2(own, pick, state.d, smallest);
            ++state.evaluations;
            bits &= ~(1u << place);
            if (distance >= smallest) continue;
            smallest = distance;
            state.near_pick[point] = int32_t(first + place);
            bits = candidates(squares, errors, info.error, distance, state.scale, bits);
        }
    }
    state.seen[point] = int32_t(seen);
    state.distances[point] = smallest;
}

// The point that is farthest from the picks, the lowest of equals, or -1 if none is beyond the
// limit.
int64_t farthest(KCenter& state, float limit) {
    int64_t found = -1;
    int32_t points[piece];
    for (int64_t next = 0; next < state.n;) {
        int count = collect(state, limit, next, points, next ? piece : first_piece);
        count = beyond_the_neighbours(state, limit, points, count);
        count = beyond_the_likeliest(state, limit, points, count);
        int64_t first = state.done;  // to be compared in bytes with picks from this one on
        for (int i = 0; i < count; ++i) first = min2<int64_t>(first, state.in_bytes[points[i]]);
        for (first = first / bound_block * bound_block; first < state.done && count;
             first += bound_block)
            count = still_beyond(state, first, limit, points, count);
        for (int i = 0; i < count; ++i)
            fetch(state.points + size_t(points[i]) * state.d, state.d * sizeof(float));
        for (int i = 0; i < count; ++i) {
            compare(state, points[i], limit);
            if (!(state.distances[points[i]] > limit)) continue;
            found = points[i];
            limit = state.radius = state.distances[found];
        }
    }
    return found;
}

}  // namespace

// False if a coordinate is not a number or larger than `largest`.
bool kcenter_begin(KCenter& state, float largest) {
    const int64_t start = state.picks[0];
    for (int64_t i = 0; i < state.n; ++i) {
        const float* point = state.points + i * state.d;
        if (!all_within(point, state.d, largest)) return false;
        uint8_t* bytes = state.point_bytes + i * state.bytes;
        memset(bytes + state.bytes - kcenter_bytes, made_positive, kcenter_bytes);
        state.infos[i] = to_bytes(point, state.origin, state.scale, state.d, bytes);
        const float distance = dist2(point, state.points + start * state.d, state.d, INFINITY);
        state.distances[i] = distance;
        state.seen[i] = state.in_bytes[i] = 1;
        state.radius = max2(state.radius, distance);
    }
    for (int64_t i = 0; i < state.n; i += kcenter_group) state.peaks[i / kcenter_group] = INFINITY;
    for (int64_t i = state.n; i % kcenter_group; ++i) state.distances[i] = -1;  // as if picked
    for (int64_t i = -1; i <= state.n; ++i) state.near_pick[i] = 0;
    state.evaluations = state.n - 1;
    add_pick(state, start);
    return true;
}

void kcenter_advance(KCenter& state, int64_t picked) {
    while (state.done < picked) {
        const float last = state.radius;
        int64_t point;
        // Picks have negative distances, so any other point is beyond -0.5.
        while ((point = farthest(state, state.step < 1 ? last * (1 - state.step) : -0.5f)) < 0)
            state.step = 2 * state.step + 1e-4f;
        if (last > 0) state.step += 0.2f * (1 - state.radius / last - state.step);
        add_pick(state, point);
    }
}

}  // namespace SPD_ISA
}  // namespace spd
