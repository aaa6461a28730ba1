// Vectors of the processor's own width, for the loops that a compiler does not vectorise well by
// itself. Everything else is plain C++.
//
// Wider types than the registers spill, narrower ones waste them, so the width follows the
// instruction set that the file is compiled for.
#pragma once

#include "common.h"
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace spd {
namespace {  // internal linkage: see common.h

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * lanes)));
typedef int32_t Ints __attribute__((vector_size(4 * lanes)));

// Rows are padded to whole pairs of vectors, so that loops over them have no tails.
constexpr int row_multiple = 32;
static inline int padded(int n) { return (n + row_multiple - 1) / row_multiple * row_multiple; }

static inline Floats load(const float* p) {
    Floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

// The first `count` floats, or as many as there is room for, then zeros.
static inline Floats load_first(const float* p, int count) {
    if (count >= lanes) return load(p);
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
#elif defined(__AVX2__)
    return (Floats)_mm256_maskload_ps(p, (__m256i)(Ints{0, 1, 2, 3, 4, 5, 6, 7} < Ints{} + count));
#else
    Floats v = {};
    for (int i = 0; i < count; ++i) v[i] = p[i];
    return v;
#endif
}

static inline void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }

// Of each place; b where one is NaN. Of a comparison GCC makes one instruction only where neither
// NaN nor -0 counts.
static inline Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (Floats)_mm_min_ps((__m128)a, (__m128)b);
#else
    return a < b ? a : b;
#endif
}
static inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (Floats)_mm_max_ps((__m128)a, (__m128)b);
#else
    return a > b ? a : b;
#endif
}

// a * b + c, rounded once where there is an instruction for it, and whatever -ffp-contract says.
static inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// Halves are added to each other until one number is left: the same tree for any width.
static inline float sum_of(Floats v) {
#if defined(__AVX512F__)
    const __m256 eight =
        _mm512_castps512_ps256((__m512)v) + (__m256)_mm512_extractf64x4_pd((__m512d)v, 1);
#elif defined(__AVX2__)
    const __m256 eight = (__m256)v;
#endif
#if defined(__AVX2__)
    const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
#else
    const Floats four = v;
#endif
    return (four[0] + four[2]) + (four[1] + four[3]);
}

static inline int32_t sum_of(Ints v) {
#if defined(__AVX512F__)
    typedef int32_t Eight __attribute__((vector_size(32)));
    const Eight rest =
        (Eight)_mm512_castsi512_si256((__m512i)v) + (Eight)_mm512_extracti64x4_epi64((__m512i)v, 1);
#else
    const Ints rest = v;
#endif
    int32_t sum = 0;
    for (size_t i = 0; i < sizeof rest / sizeof sum; ++i) sum += rest[i];
    return sum;
}

// ----------------------------------------------------------------------------- pixels of some rows

// A vector seen as quarters: four floats for each of `pixel_rows` rows.
constexpr int pixel_rows = lanes / 4;

static inline void store_quarter(float* p, const Floats& v, int quarter) {
    memcpy(p, reinterpret_cast<const float*>(&v) + 4 * quarter, 16);
}

// Rows to columns, of every quarter.
static inline void transpose_quarters(Floats* v) {
#if defined(__AVX512F__)
#define SPD_UNPACK(part, type, a, b) (__m512) _mm512_unpack##part((type)(a), (type)(b))
    typedef __m512 Singles;
    typedef __m512d Doubles;
#elif defined(__AVX2__)
#define SPD_UNPACK(part, type, a, b) (__m256) _mm256_unpack##part((type)(a), (type)(b))
    typedef __m256 Singles;
    typedef __m256d Doubles;
#elif defined(__SSE2__)
#define SPD_UNPACK(part, type, a, b) (__m128) _mm_unpack##part((type)(a), (type)(b))
    typedef __m128 Singles;
    typedef __m128d Doubles;
#endif
#ifdef SPD_UNPACK
    const Singles a = SPD_UNPACK(lo_ps, Singles, v[0], v[1]),
                  b = SPD_UNPACK(lo_ps, Singles, v[2], v[3]),
                  c = SPD_UNPACK(hi_ps, Singles, v[0], v[1]),
                  d = SPD_UNPACK(hi_ps, Singles, v[2], v[3]);
    v[0] = (Floats)SPD_UNPACK(lo_pd, Doubles, a, b);
    v[1] = (Floats)SPD_UNPACK(hi_pd, Doubles, a, b);
    v[2] = (Floats)SPD_UNPACK(lo_pd, Doubles, c, d);
    v[3] = (Floats)SPD_UNPACK(hi_pd, Doubles, c, d);
#undef SPD_UNPACK
#else
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < i; ++j) {
            const float kept = v[i][j];
            v[i][j] = v[j][i];
            v[j][i] = kept;
        }
#endif
}

// Four interleaved RGB pixels of each row, of which pixel(j) gives the jth as numbers 0..255 in
// the first three places of the row's quarter. Touches up to `read_past` pixels more.
struct FourPixels {
#ifdef __SSE4_1__
    static constexpr int read_past = 2;
    static __m128i row(const uint8_t* p) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    }
    static __m128i places(int j) {  // widens three bytes
        const int at = 3 * j;
        return _mm_setr_epi8(at, -1, -1, -1, at + 1, -1, -1, -1, at + 2, -1, -1, -1, -1, -1, -1,
                             -1);
    }
#endif
#if defined(__AVX512F__)
    __m512i bytes;
    FourPixels(const uint8_t* const* s, int at)
        : bytes(_mm512_inserti32x4(
              _mm512_inserti32x4(
                  _mm512_inserti32x4(_mm512_castsi128_si512(row(s[0] + at)), row(s[1] + at), 1),
                  row(s[2] + at), 2),
              row(s[3] + at), 3)) {}
    Floats pixel(int j) const {
        const __m512i widened = _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(places(j)));
        return (Floats)_mm512_cvtepi32_ps(widened);
    }
#elif defined(__AVX2__)
    __m256i bytes;
    FourPixels(const uint8_t* const* s, int at)
        : bytes(
              _mm256_inserti128_si256(_mm256_castsi128_si256(row(s[0] + at)), row(s[1] + at), 1)) {}
    Floats pixel(int j) const {
        const __m256i widened = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(places(j)));
        return (Floats)_mm256_cvtepi32_ps(widened);
    }
#elif defined(__SSE4_1__)
    __m128i bytes;
    FourPixels(const uint8_t* const* s, int at) : bytes(row(s[0] + at)) {}
    Floats pixel(int j) const {
        return (Floats)_mm_cvtepi32_ps(_mm_shuffle_epi8(bytes, places(j)));
    }
#else
    static constexpr int read_past = 0;
    const uint8_t* bytes;
    FourPixels(const uint8_t* const* s, int at) : bytes(s[0] + at) {}
    Floats pixel(int j) const {
        return Floats{float(bytes[3 * j]), float(bytes[3 * j + 1]), float(bytes[3 * j + 2]), 0};
    }
#endif
};

// ------------------------------------------------------------------------ looking up in registers

// lookup(a, i)[j] = a[i[j]], 0 <= i[j] < lanes
#if defined(__AVX512F__)
constexpr bool has_lookup = true;
static inline Floats lookup(Floats a, Ints i) {
    return (Floats)_mm512_permutexvar_ps((__m512i)i, (__m512)a);
}
#elif defined(__AVX2__)
constexpr bool has_lookup = true;
static inline Floats lookup(Floats a, Ints i) {
    return (Floats)_mm256_permutevar8x32_ps((__m256)a, (__m256i)i);
}
#else
constexpr bool has_lookup = false;
static inline Floats lookup(Floats a, Ints) { return a; }
#endif

// ----------------------------------------------------------------------------------------- output

// Writes a whole vector; `streamed` past the caches, to where it is aligned to its size, and
// followed by `streams_are_done` before another thread reads it.
template <bool streamed>
static inline void put(float* p, Floats v) {
#if defined(__AVX512F__)
    if (streamed) return _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
    if (streamed) return _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__)
    if (streamed) return _mm_stream_ps(p, (__m128)v);
#endif
    store(p, v);
}

// As half precision, rounded to nearest even; only where the processor has an instruction for it.
#if defined(__F16C__) && defined(__AVX2__)
#define SPD_HAS_PUT_HALF
template <bool streamed>
static inline void put_half(uint16_t* p, Floats v) {
#if defined(__AVX512F__)
    const __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
    if (streamed) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), h);
    memcpy(p, &h, sizeof h);
#else
    const __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
    if (streamed) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), h);
    memcpy(p, &h, sizeof h);
#endif
}
#endif

static inline void streams_are_done() {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

}  // namespace
}  // namespace spd
