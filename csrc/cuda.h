// What the .cu files share. nvcc compiles them; for tests a C++ compiler does, after
// tests/cuda/on_cpu.h.
#pragma once

#include "common.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>

#define SPD_LAUNCH(kernel, grid, threads, shared, stream, ...) \
    kernel<<<grid, threads, shared, stream>>>(__VA_ARGS__)
#define SPD_DYNAMIC_SHARED(T, name) extern __shared__ __align__(16) T name[]

// Within a unit or two in the last place.
__device__ inline float quick_exp2(float v) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v));
    return power;
}
__device__ inline float quick_inverse(float v) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(v));
    return inverse;
}

// Of which at least one byte may be read: what lies in one word lies in one page.
__device__ inline uint32_t load_word(const uint32_t* from) { return *from; }

// c += a b on tensor cores: (16, 16) by (16, 8) of half precision, sums in float. The lanes of a
// warp hold the operands as PTX's mma.m16n8k16 has them. Volatile, so that no product is moved into
// a branch that some lanes do not take.
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
#else  // Turing takes half as much at once
    for (int half = 0; half < 2; ++half)
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
            : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
              "f"(c[3]));
#endif
}
#endif

namespace spd {

struct CudaState {
    int runtime, driver;  // 1000 * major + 10 * minor
    int devices;
    const char* error;  // of looking for devices; empty if there is simply none
};
CudaState cuda_state();
const char* cuda_launch_error();  // of what was launched since the last call, or null

constexpr unsigned all_lanes = 0xffffffff;
constexpr int warp_size = 32;
constexpr size_t most_shared = 48 << 10;  // bytes a block may have without asking for more

struct Half {
    uint16_t bits;
};
struct Bfloat {
    uint16_t bits;
};
SPD_HD static inline float value_of(float v) { return v; }
SPD_HD static inline float value_of(Half v) { return from_half(v.bits); }
SPD_HD static inline float value_of(Bfloat v) { return float_of(uint32_t(v.bits) << 16); }
SPD_HD static inline float value_of(uint8_t v) { return v; }
SPD_HD static inline uint32_t to_halves(float low, float high) {
    return to_half(low) | uint32_t(to_half(high)) << 16;
}

}  // namespace spd
