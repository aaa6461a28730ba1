// Points in bytes: enough of them to tell which distances need not be computed.
//
// A point x is written as integers q, |q| <= 63, with origin + q / scale near x. What is left over
// is known: its length in units of the integers is the point's `error`. Distances of integers are
// exact, so scale |x - y| >= |q_x - q_y| - error_x - error_y, whatever the origin and the scale.
#pragma once

#include <cmath>

#include "dist2.h"
#include "kcenter.h"

namespace spd {
namespace {  // internal linkage: see common.h

// With 63, products of two pairs fit 16 bits if one factor is made positive by adding 64. A point
// is stored as q + 64, and as q in a block with which others are compared.
constexpr int largest_byte = kcenter_largest_byte, made_positive = 64;
constexpr int byte_step = 8;  // coordinates that are multiplied at once

// GCC 12 narrows a vector one number at a time.
static inline void store_bytes(uint8_t* to, Ints integers) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)to, _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)integers));
#elif defined(__AVX2__)
    const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)integers),
                                          _mm256_extracti128_si256((__m256i)integers, 1));
    _mm_storel_epi64((__m128i*)to, _mm_packs_epi16(pairs, pairs));
#else
    for (int i = 0; i < lanes; ++i) to[i] = uint8_t(integers[i]);
#endif
}

// x (d,) to q + 64, with q = 0 from d to the next multiple of lanes. An error is too large rather
// than too small: the margins cover the rounding of up to 65,536 terms.
static inline ByteInfo to_bytes(const float* x, const float* origin, float scale, int d,
                                uint8_t* bytes) {
    // 1.5 * 2^23: a sum with it is rounded to a whole number, by which its bits are larger.
    constexpr float shift = 12582912;
    const Floats most = Floats{} + largest_byte;
    Floats left_over = {};
    Ints square = {};
    for (int c = 0; c < d; c += lanes) {
        const Floats place = (load_first(x + c, d - c) - load_first(origin + c, d - c)) * scale;
        const Floats shifted = larger(smaller(place, most), -most) + shift;
        const Ints integers = (Ints)shifted - int32_t(bits_of(shift));
        const Floats rest = place - (shifted - shift);
        left_over = multiply_add(rest, rest, left_over);
        square += integers * integers;
        store_bytes(bytes + c, integers + made_positive);
    }
    ByteInfo info{0, sum_of(square)};
    const float length = sqrtf(sum_of(left_over));
    info.error = length * 1.001f + 1e-6f * (length + sqrtf(float(info.square)));
    return info;
}

#if defined(__AVX512F__)
#define SPD_BYTES(what) _mm512_##what
typedef __m512i ByteVector;
#elif defined(__AVX2__)
#define SPD_BYTES(what) _mm256_##what
typedef __m256i ByteVector;
#elif defined(__SSSE3__)
#define SPD_BYTES(what) _mm_##what
typedef __m128i ByteVector;
#endif

// sum[i] + the products of four bytes of `a`, from 4 i, with four of `x`, and of `b` with `y`.
static inline Ints add_products(Ints sum, const int8_t* a, const int8_t* b, const uint8_t* x,
                                const uint8_t* y) {
#ifdef __SSSE3__
    int32_t four_x, four_y;
    memcpy(&four_x, x, 4);
    memcpy(&four_y, y, 4);
    ByteVector va, vb;  // second factors, which have signs, as only those can stay in memory
    memcpy(&va, a, sizeof va);
    memcpy(&vb, b, sizeof vb);
    const ByteVector pairs =
        SPD_BYTES(add_epi16)(SPD_BYTES(maddubs_epi16)(SPD_BYTES(set1_epi32)(four_x), va),
                             SPD_BYTES(maddubs_epi16)(SPD_BYTES(set1_epi32)(four_y), vb));
    return sum + (Ints)SPD_BYTES(madd_epi16)(pairs, SPD_BYTES(set1_epi16)(1));
#else
    for (int i = 0; i < lanes; ++i)
        for (int j = 0; j < 4; ++j) sum[i] += a[4 * i + j] * x[j] + b[4 * i + j] * y[j];
    return sum;
#endif
}

// The squared distance of two points as they are stored, in whole vectors: bytes is a multiple of
// 4 * lanes.
static inline int32_t byte_distance(const uint8_t* a, const uint8_t* b, int bytes) {
#ifdef __SSSE3__
    Ints sum = {};
    for (int c = 0; c < bytes; c += int(sizeof(ByteVector))) {
        ByteVector va, vb;
        memcpy(&va, a + c, sizeof va);
        memcpy(&vb, b + c, sizeof vb);
        const ByteVector size =
            SPD_BYTES(sub_epi8)(SPD_BYTES(max_epu8)(va, vb), SPD_BYTES(min_epu8)(va, vb));
        const ByteVector pairs = SPD_BYTES(maddubs_epi16)(size, size);  // 2 * 126^2 fits
        sum += (Ints)SPD_BYTES(madd_epi16)(pairs, SPD_BYTES(set1_epi16)(1));
    }
    return sum_of(sum);
#else
    int32_t total = 0;
    for (int c = 0; c < bytes; ++c) total += (a[c] - b[c]) * (a[c] - b[c]);
    return total;
#endif
}

// A block holds `bound_block` points: four coordinates of each, then the next four. Returns by how
// much the products with a point are too large, as its integers are made positive.
static inline int32_t put_in_block(int8_t* block, int place, const uint8_t* point, int bytes) {
    int32_t sum = 0;
    for (int c = 0; c < bytes; ++c) {
        const int q = point[c] - made_positive;
        block[(c / 4 * bound_block + place) * 4 + c % 4] = int8_t(q);
        sum += q;
    }
    return made_positive * sum;
}

// Squared distances of a point's integers (bytes,), a multiple of byte_step, to those of a block.
// `block_squares` are the squares of those in the block, and twice their excess. Where only the
// order within a block counts, `square` may be 0 for the point's own; the distances may then be
// negative.
static inline void block_byte_distances(const int8_t* block, const int32_t* block_squares,
                                        const uint8_t* point, int32_t square, int bytes,
                                        Floats* out) {
    constexpr int four = 4 * bound_block;  // bytes of four coordinates
    Ints products[block_vectors] = {};
#pragma GCC unroll 4
    for (int c = 0; c < bytes; c += byte_step)
        for (int v = 0; v < block_vectors; ++v) {
            const int8_t* a = block + c * bound_block + v * 4 * lanes;
            products[v] = add_products(products[v], a, a + four, point + c, point + c + 4);
        }
    for (int v = 0; v < block_vectors; ++v) {
        Ints squares;
        memcpy(&squares, block_squares + v * lanes, sizeof squares);
        squares += square - 2 * products[v];
        out[v] = __builtin_convertvector(squares, Floats);
    }
}

}  // namespace
}  // namespace spd
