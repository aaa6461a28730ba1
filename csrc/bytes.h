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

// With 63, products of two pairs fit 16 bits if one factor is made positive by adding 64.
constexpr int largest_byte = kcenter_largest_byte, made_positive = 64;
constexpr int byte_step = 8;  // coordinates that are multiplied at once

// GCC 12 narrows a vector one number at a time.
static inline void store_bytes(int8_t* to, Ints integers) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)to, _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)integers));
#elif defined(__AVX2__)
    const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)integers),
                                          _mm256_extracti128_si256((__m256i)integers, 1));
    _mm_storel_epi64((__m128i*)to, _mm_packs_epi16(pairs, pairs));
#else
    for (int i = 0; i < lanes; ++i) to[i] = int8_t(integers[i]);
#endif
}

// x (d,) to q, which has zeros from d to the next multiple of lanes. An error is too large rather
// than too small: the margins cover the rounding of up to 65,536 terms.
static inline ByteInfo to_bytes(const float* x, const float* origin, float scale, int d,
                                int8_t* q) {
    constexpr float shift = 12582912;  // 1.5 * 2^23: adding it rounds to whole numbers
    Floats left_over = {};
    Ints square = {}, sum = {};
    for (int c = 0; c < d; c += lanes) {
        const Floats place = (load_first(x + c, d - c) - load_first(origin + c, d - c)) * scale;
        Floats whole = place < -float(largest_byte) ? Floats{} - largest_byte : place;
        whole = whole > float(largest_byte) ? Floats{} + largest_byte : whole;
        whole = (whole + shift) - shift;
        left_over += (place - whole) * (place - whole);
        const Ints integers = __builtin_convertvector(whole, Ints);
        square += integers * integers;
        sum += integers;
        store_bytes(q + c, integers);
    }
    ByteInfo info{0, 0, 0};
    for (int i = 0; i < lanes; ++i) {
        info.square += square[i];
        info.excess += sum[i] * made_positive;
    }
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
static inline Ints add_products(Ints sum, const uint8_t* a, const uint8_t* b, const int8_t* x,
                                const int8_t* y) {
#ifdef __SSSE3__
    int32_t four_x, four_y;
    memcpy(&four_x, x, 4);
    memcpy(&four_y, y, 4);
    ByteVector va, vb;
    memcpy(&va, a, sizeof va);
    memcpy(&vb, b, sizeof vb);
    const ByteVector pairs =
        SPD_BYTES(add_epi16)(SPD_BYTES(maddubs_epi16)(va, SPD_BYTES(set1_epi32)(four_x)),
                             SPD_BYTES(maddubs_epi16)(vb, SPD_BYTES(set1_epi32)(four_y)));
    return sum + (Ints)SPD_BYTES(madd_epi16)(pairs, SPD_BYTES(set1_epi16)(1));
#else
    for (int i = 0; i < lanes; ++i)
        for (int j = 0; j < 4; ++j) sum[i] += a[4 * i + j] * x[j] + b[4 * i + j] * y[j];
    return sum;
#endif
}

// A block holds `bound_block` points, made positive: four coordinates of each, then the next four.
static inline void put_in_block(uint8_t* block, int place, const int8_t* q, int bytes) {
    for (int c = 0; c < bytes; ++c)
        block[(c / 4 * bound_block + place) * 4 + c % 4] = uint8_t(q[c] + made_positive);
}

// Squared distances of the integers q (bytes,), a multiple of byte_step, to those of a block.
static inline void byte_distances(const uint8_t* block, const int32_t* block_squares,
                                  const int8_t* q, const ByteInfo& info, int bytes, Floats* out) {
    constexpr int four = 4 * bound_block;  // bytes of four coordinates
    Ints products[block_vectors] = {};
    for (int c = 0; c < bytes; c += byte_step)
        for (int v = 0; v < block_vectors; ++v) {
            const uint8_t* a = block + c * bound_block + v * 4 * lanes;
            products[v] = add_products(products[v], a, a + four, q + c, q + c + 4);
        }
    for (int v = 0; v < block_vectors; ++v) {
        Ints squares;
        memcpy(&squares, block_squares + v * lanes, sizeof squares);
        squares += info.square - 2 * (products[v] - info.excess);
        out[v] = __builtin_convertvector(squares, Floats);
    }
}

}  // namespace
}  // namespace spd
