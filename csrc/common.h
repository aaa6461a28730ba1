// What every operation shares. Nothing here or in any other header knows torch or Python.
//
// The hot .cpp files are compiled once per instruction set. A function with external linkage that
// two of those objects share would be merged by the linker, and the AVX-512 copy of, say,
// std::vector::resize might then run on a machine without it. So the hot files use no std
// containers, header functions are `static`, and what they export lives in `namespace SPD_ISA`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef __CUDACC__
#define SPD_HD __host__ __device__
#else
#define SPD_HD
#endif

namespace spd {

enum class DType { float32, float16, bfloat16, uint8 };

template <class T>
SPD_HD static inline T min2(T a, T b) {
    return a < b ? a : b;
}
template <class T>
SPD_HD static inline T max2(T a, T b) {
    return a > b ? a : b;
}
// A GPU has one instruction for each; they differ where a number is NaN.
SPD_HD static inline float min2(float a, float b) {
#ifdef __CUDA_ARCH__
    return fminf(a, b);
#else
    return a < b ? a : b;
#endif
}
SPD_HD static inline float max2(float a, float b) {
#ifdef __CUDA_ARCH__
    return fmaxf(a, b);
#else
    return a > b ? a : b;
#endif
}
SPD_HD static inline float clamp01(float v) { return min2(max2(v, 0.f), 1.f); }

SPD_HD static inline uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}
SPD_HD static inline float float_of(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

// Round to nearest even. NaN stays NaN, overflow becomes infinity.
SPD_HD static inline uint16_t to_half(float f) {
#ifdef __CUDA_ARCH__
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
#else
    const uint32_t sign = (bits_of(f) >> 16) & 0x8000;
    const uint32_t x = bits_of(f) & 0x7fffffff;
    if (x > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (x >= 0x477ff000) return uint16_t(sign | 0x7c00);
    // Below 2^-14 halves are subnormal: adding 0.5 makes the float unit round at their last bit.
    if (x < 0x38800000) return uint16_t(sign | (bits_of(float_of(x) + 0.5f) - 0x3f000000));
    return uint16_t(sign | ((x + 0xc8000fff + ((x >> 13) & 1)) >> 13));
#endif
}

SPD_HD static inline float from_half(uint16_t h) {
#ifdef __CUDA_ARCH__
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
#else
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x400) return float_of(sign | ((rest << 13) + 0x38000000));
    return float_of(sign | bits_of(float(rest) * 0x1p-24f));
#endif
}

SPD_HD static inline uint16_t to_bfloat16(float f) {
    const uint32_t x = bits_of(f);
    if ((x & 0x7fffffff) > 0x7f800000) return uint16_t(x >> 16 | 0x40);
    return uint16_t((x + 0x7fff + ((x >> 16) & 1)) >> 16);
}

// Index of the pixel that index i outside 0..n-1 is mirrored to; the edge pixel is not repeated.
SPD_HD static inline int reflect(int i, int n) {
    if (n == 1) return 0;
    const int period = 2 * n - 2;
    i %= period;
    if (i < 0) i += period;
    return i < n ? i : period - i;
}

namespace {  // internal linkage: see above

// Hands out pieces of a block of memory.
struct Pieces {
    float *next, *end;
    float* take(size_t floats) {
        float* piece = next;
        next += (floats + 15) / 16 * 16;  // keeps every piece on a cache line of its own
        if (next > end) abort();          // whoever reserved the block counted wrong
        return piece;
    }
};

// Memory that a thread keeps between calls: it only ever grows. Not initialised.
class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { free(memory_); }

    // Room for `floats` floats, 64-byte aligned; invalidates what an earlier call returned. Null if
    // there is no memory: inside a parallel region nothing can be thrown.
    Pieces reserve(size_t floats) {
        const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
        if (bytes > size_) {
            free(memory_);
            memory_ = static_cast<float*>(aligned_alloc(64, bytes));
            size_ = memory_ ? bytes : 0;
        }
        return {memory_, memory_ ? memory_ + bytes / sizeof(float) : nullptr};
    }

  private:
    float* memory_ = nullptr;
    size_t size_ = 0;
};

}  // namespace

}  // namespace spd
