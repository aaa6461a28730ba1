// What the .cu files share. nvcc compiles them; for tests a C++ compiler does, after
// tests/cuda/on_cpu.h.
#pragma once

#include "common.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>

#define SPD_LAUNCH(kernel, grid, threads, shared, stream, ...) \
    kernel<<<grid, threads, shared, stream>>>(__VA_ARGS__)
#define SPD_DYNAMIC_SHARED(T, name) extern __shared__ T name[]
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

}  // namespace spd
