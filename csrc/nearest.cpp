// Exact nearest neighbours by lower bounds: a bound in a few coordinates for every item of the
// bank, then full distances only of those whose bound does not rule them out.

#include "nearest.h"

#include "dist2.h"

namespace spd {
namespace SPD_ISA {
namespace {

static_assert(nearest_block == bound_block, "the header cannot include vectors.h");

constexpr int group = 4;  // queries that share the reading of the bank's coordinates

// The k nearest so far, sorted by distance, then index.
struct Best {
    float* distances;
    int64_t* indices;
    int k;

    void clear() {
        for (int i = 0; i < k; ++i) {
            distances[i] = INFINITY;
            indices[i] = INT64_MAX;
        }
    }
    float farthest() const { return distances[k - 1]; }
    void offer(float distance, int64_t index) {
        int place = k;
        while (place > 0 && (distances[place - 1] > distance ||
                             (distances[place - 1] == distance && indices[place - 1] > index)))
            --place;
        if (place == k) return;
        for (int i = k - 1; i > place; --i) {
            distances[i] = distances[i - 1];
            indices[i] = indices[i - 1];
        }
        distances[place] = distance;
        indices[place] = index;
    }
};

int64_t place_of_smallest(const float* values, int64_t n) {
    int64_t place = 0;
    float smallest = INFINITY;
    for (int64_t i = 0; i < n; i += lanes)
        for (unsigned bits = below(load(values + i), smallest); bits; bits &= bits - 1) {
            const int64_t j = i + __builtin_ctz(bits);
            if (values[j] < smallest) smallest = values[place = j];
        }
    return place;
}

// `lower` holds the bounds of the bank's items, padded to whole blocks with infinity; it is
// changed.
void search(const NearestArgs& args, const float* query, float* lower, Best best) {
    const auto offer = [&](int64_t i) {
        best.offer(dist2(query, args.bank + i * args.d, args.d, best.farthest()), i);
        lower[i] = INFINITY;  // done
    };
    best.clear();
    // The items of smallest bound come first: they are probably near, and rule out most others.
    for (int i = 0; i < args.k; ++i) offer(place_of_smallest(lower, args.n));
    float limit = widened(best.farthest(), args.slack);
    for (int64_t i = 0; i < args.n; i += lanes)
        for (unsigned bits = below(load(lower + i), limit); bits; bits &= bits - 1) {
            offer(i + __builtin_ctz(bits));
            limit = widened(best.farthest(), args.slack);
        }
}

}  // namespace

bool nearest_neighbors(const NearestArgs& args, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const int64_t blocks = (args.n + bound_block - 1) / bound_block;
    const size_t padded_n = size_t(blocks) * bound_block;
    Pieces pieces = scratch.reserve(group * (padded_n + 16) + group * (args.coordinates + 16));
    if (!pieces.next) return false;
    float* lower[group];
    for (float*& l : lower) l = pieces.take(padded_n);
    float* bounds = pieces.take(size_t(group) * args.coordinates);
    for (int64_t first = begin; first < end; first += group) {
        const int count = int(min2<int64_t>(group, end - first));
        // A last group of fewer queries repeats its first one.
        for (int q = 0; q < group; ++q)
            memcpy(bounds + q * args.coordinates,
                   args.query_bounds + (q < count ? first + q : first) * args.coordinates,
                   args.coordinates * sizeof(float));
        for (int64_t b = 0; b < blocks; ++b) {
            Floats out[group * block_vectors];
            bound_distances<group>(args.bank_bounds + b * bound_block * args.coordinates, bounds,
                                   args.coordinates, out);
            for (int q = 0; q < group; ++q)
                for (int v = 0; v < block_vectors; ++v)
                    store(lower[q] + b * bound_block + v * lanes, out[q * block_vectors + v]);
        }
        for (int q = 0; q < count; ++q) {
            for (size_t i = args.n; i < padded_n; ++i) lower[q][i] = INFINITY;
            const int64_t number = first + q;
            search(args, args.queries + number * args.d, lower[q],
                   {args.distances + number * args.k, args.indices + number * args.k, args.k});
        }
    }
    return true;
}

}  // namespace SPD_ISA
}  // namespace spd
