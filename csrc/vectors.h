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

static inline void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }

static inline float sum_of(Floats v) {
    float sum = 0;
    for (int i = 0; i < lanes; ++i) sum += v[i];
    return sum;
}

typedef float Pixel4 __attribute__((vector_size(16)));

// Rows to columns.
static inline void transpose(Pixel4* v) {
#ifdef __SSE2__
    _MM_TRANSPOSE4_PS(*reinterpret_cast<__m128*>(v), *reinterpret_cast<__m128*>(v + 1),
                      *reinterpret_cast<__m128*>(v + 2), *reinterpret_cast<__m128*>(v + 3));
#else
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < i; ++j) {
            const float kept = v[i][j];
            v[i][j] = v[j][i];
            v[j][i] = kept;
        }
#endif
}

// ------------------------------------------------------------------------------ bytes of pixels

// One channel of `lanes` interleaved RGB pixels, as numbers 0..255. What is read past them is at
// most `read_past` pixels. Four pixels go to each 16 bytes of a register, then a shuffle of bytes
// picks the channel and widens it in one go.
#if defined(__SSE4_1__)
struct Pixels {
#if defined(__AVX512F__)
    static constexpr int read_past = 6;
    __m512i bytes;
    explicit Pixels(const uint8_t* p)
        : bytes(_mm512_permutexvar_epi32(
              _mm512_setr_epi32(0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12),
              _mm512_loadu_si512(p))) {}
    Floats channel(int c) const {
        const __m512i widened = _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(places(c)));
        return (Floats)_mm512_cvtepi32_ps(widened);
    }
#elif defined(__AVX2__)
    static constexpr int read_past = 3;
    __m256i bytes;
    explicit Pixels(const uint8_t* p)
        : bytes(_mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                                            _mm256_setr_epi32(0, 1, 2, 3, 3, 4, 5, 6))) {}
    Floats channel(int c) const {
        const __m256i widened = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(places(c)));
        return (Floats)_mm256_cvtepi32_ps(widened);
    }
#else
    static constexpr int read_past = 2;
    __m128i bytes;
    explicit Pixels(const uint8_t* p)
        : bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) {}
    Floats channel(int c) const {
        return (Floats)_mm_cvtepi32_ps(_mm_shuffle_epi8(bytes, places(c)));
    }
#endif
    static __m128i places(int c) {
        return _mm_setr_epi8(c, -1, -1, -1, c + 3, -1, -1, -1, c + 6, -1, -1, -1, c + 9, -1, -1,
                             -1);
    }
};
#else
struct Pixels {
    static constexpr int read_past = 0;
    const uint8_t* bytes;
    explicit Pixels(const uint8_t* p) : bytes(p) {}
    Floats channel(int c) const {
        Floats v;
        for (int i = 0; i < lanes; ++i) v[i] = bytes[3 * i + c];
        return v;
    }
};
#endif

// ------------------------------------------------------------------------ looking up in registers

// lookup(a, i)[j] = a[i[j]], 0 <= i[j] < lanes; lookup2 looks in two vectors, 0 <= i[j] < 2 *
// lanes.
#if defined(__AVX512F__)
constexpr bool has_lookup = true;
static inline Floats lookup(Floats a, Ints i) {
    return (Floats)_mm512_permutexvar_ps((__m512i)i, (__m512)a);
}
static inline Floats lookup2(Floats a, Floats b, Ints i) {
    return (Floats)_mm512_permutex2var_ps((__m512)a, (__m512i)i, (__m512)b);
}
#elif defined(__AVX2__)
constexpr bool has_lookup = true;
static inline Floats lookup(Floats a, Ints i) {
    return (Floats)_mm256_permutevar8x32_ps((__m256)a, (__m256i)i);
}
static inline Floats lookup2(Floats a, Floats b, Ints i) {
    const __m256 in_b = (__m256)(i << 28);  // bit 3, "beyond the first vector", as the sign
    return (Floats)_mm256_blendv_ps((__m256)lookup(a, i), (__m256)lookup(b, i), in_b);
}
#else
constexpr bool has_lookup = false;
static inline Floats lookup(Floats a, Ints) { return a; }
static inline Floats lookup2(Floats a, Floats, Ints) { return a; }
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
