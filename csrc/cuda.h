// What the .cu files share. nvcc compiles them; for tests a C++ compiler does, after
// tests/cuda/on_cpu.h.
#pragma once

#include <cstddef>

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

}  // namespace spd
