// Vectors of 8 rows, the columns of a panel. GCC and Clang split them where registers are narrower.
#pragma once

#include "common.h"
#ifdef __SSE4_1__
#include <immintrin.h>
#endif

namespace spd {

typedef float Rows __attribute__((vector_size(32)));

// Panels that share what is loaded of the other factor of a product: three of them with four
// columns each are 12 sums, which the 16 registers of AVX2 have room for. Narrower ones hold half a
// vector.
#ifdef __AVX2__
constexpr int panel_group = 3;
#else
constexpr int panel_group = 1;
#endif

static inline Rows load_rows(const float* p) {
    Rows v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline Rows load_rows(const uint16_t* half) {
    Rows v;
#ifdef __F16C__
    __m128i h;
    memcpy(&h, half, sizeof h);
    const __m256 f = _mm256_cvtph_ps(h);
    memcpy(&v, &f, sizeof v);
#else
    for (int i = 0; i < 8; ++i) v[i] = from_half(half[i]);
#endif
    return v;
}

static inline Rows load_rows(const int8_t* bytes) {
    Rows v;
#ifdef __AVX2__
    const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
    const __m256 f = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b));
    memcpy(&v, &f, sizeof v);
#elif defined(__SSE4_1__)
    const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
    const __m128 f[] = {_mm_cvtepi32_ps(_mm_cvtepi8_epi32(b)),
                        _mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_srli_epi64(b, 32)))};
    memcpy(&v, f, sizeof v);
#else
    for (int i = 0; i < 8; ++i) v[i] = bytes[i];
#endif
    return v;
}

static inline void store_rows(float* p, Rows v) { memcpy(p, &v, sizeof v); }

// The four columns of 8 rows of four.
static inline void load_columns(const float* p, Rows (&column)[4]) {
#ifdef __AVX2__
    __m256 row[4];  // and the one four below in the upper half
    for (int i = 0; i < 4; ++i)
        row[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 4 * i)),
                                      _mm_loadu_ps(p + 4 * i + 16), 1);
    const __m256 a = _mm256_unpacklo_ps(row[0], row[1]), b = _mm256_unpacklo_ps(row[2], row[3]);
    const __m256 c = _mm256_unpackhi_ps(row[0], row[1]), d = _mm256_unpackhi_ps(row[2], row[3]);
    column[0] = (Rows)_mm256_shuffle_ps(a, b, 0x44);
    column[1] = (Rows)_mm256_shuffle_ps(a, b, 0xee);
    column[2] = (Rows)_mm256_shuffle_ps(c, d, 0x44);
    column[3] = (Rows)_mm256_shuffle_ps(c, d, 0xee);
#else
    for (int i = 0; i < 8; ++i)
        for (int k = 0; k < 4; ++k) column[k][i] = p[4 * i + k];
#endif
}

}  // namespace spd
