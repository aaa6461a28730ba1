// How the DALI operator plans the rounds of the CUDA kernels, run on the CPU: a function for
// ctypes. augment_views.cu is compiled for the CPU beside it, see on_cpu.h.

#include "../../csrc/dali/gpu_rounds.h"

#include <cstring>
#include <memory>

extern "C" __attribute__((visibility("default"))) void make_views(
    const uint8_t* pixels, const int64_t* images, const spd::ViewParams* params, int n, int views,
    int height, int width, void* out, int dtype, const int64_t* stride, const float* scale,
    const float* shift) {
    const std::vector<spd::ViewParams> rows(params, params + size_t(n) * views);
    spd::GpuViews target{out, spd::DType(dtype), {}, {}, {}, views};
    std::copy(stride, stride + 5, target.stride);
    std::copy(scale, scale + 3, target.scale);
    std::copy(shift, shift + 3, target.shift);
    std::vector<std::unique_ptr<char[]>> memory;
    const auto allocate = [&](size_t bytes) -> void* {
        memory.emplace_back(new char[bytes]);
        memset(memory.back().get(), 0xff, bytes);  // NaN
        return memory.back().get();
    };
    spd::make_views_on_gpu({pixels, images, params, rows, n, views, height, width, target, nullptr},
                           allocate);
}
