// Squared distances in a defined order of operations, and lower bounds that rule most of them out.
//
// Files that include this are compiled with -ffp-contract=off: a multiply-add that rounds once
// would make distances, and with them the points that are picked, differ between processors.
#pragma once

#include <cmath>

#include "vectors.h"

namespace spd {
namespace {  // internal linkage: see common.h

constexpr int partial_sums = 32;
// Lower bounds are computed for so many points at once; their coordinates are interleaved.
constexpr int bound_block = 16;
constexpr int block_vectors = bound_block / lanes;

// Halves are added to each other until one number is left: the same tree for any vector width.
static inline float tree_sum(const Floats* sums) {
    constexpr int vectors = partial_sums / lanes;
    Floats part[vectors];
    for (int i = 0; i < vectors; ++i) part[i] = sums[i];
    for (int half = vectors / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) part[i] += part[i + half];
    return sum_of(part[0]);
}

// Squared distance, or infinity where a part of the sum already exceeds `limit`. Rounding is
// monotonic, so a sum of fewer squares is never the larger one.
static inline float dist2(const float* a, const float* b, int d, float limit) {
    Floats sums[partial_sums / lanes] = {};
    int k = 0;
    for (; k + partial_sums <= d; k += partial_sums) {
        for (int i = 0; i < partial_sums / lanes; ++i) {
            const Floats delta = load(a + k + i * lanes) - load(b + k + i * lanes);
            sums[i] += delta * delta;
        }
        if (k % 128 == 96 && tree_sum(sums) > limit) return INFINITY;
    }
    for (int i = 0; k < d; ++i, k += lanes) {  // the last ones, and zeros
        const Floats delta = load_first(a + k, d - k) - load_first(b + k, d - k);
        sums[i] += delta * delta;
    }
    return tree_sum(sums);
}

// The squared distance of two points' bound coordinates below which their own may be at most
// `distance`. The factor covers the rounding of both sums, `slack` that of the coordinates.
static inline float widened(float distance, float slack) {
    const float reach = sqrtf(distance) * 1.0001f + slack;
    return reach * reach;
}

// Bit i is set unless a[i] >= b[i].
static inline unsigned below(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NGE_UQ);
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NGE_UQ));
#elif defined(__SSE2__)
    return _mm_movemask_ps(_mm_cmpnge_ps((__m128)a, (__m128)b));
#else
    unsigned bits = 0;
    for (int i = 0; i < lanes; ++i) bits |= unsigned(!(a[i] >= b[i])) << i;
    return bits;
#endif
}
static inline unsigned below(Floats a, float limit) { return below(a, Floats{} + limit); }

// Squared distances from the coordinates of `queries` points, one row after the other, to those of
// a block: out[q * block_vectors + v]. Bounds may round as they like.
template <int queries>
static inline void bound_distances(const float* block, const float* query, int coordinates,
                                   Floats* out) {
    Floats sum[queries * block_vectors] = {};
    for (int c = 0; c < coordinates; ++c)
        for (int v = 0; v < block_vectors; ++v) {
            const Floats item = load(block + c * bound_block + v * lanes);
            for (int q = 0; q < queries; ++q) {
                const Floats delta = item - query[q * coordinates + c];
                Floats& to = sum[q * block_vectors + v];
                to = multiply_add(delta, delta, to);
            }
        }
    for (int i = 0; i < queries * block_vectors; ++i) out[i] = sum[i];
}

}  // namespace
}  // namespace spd
