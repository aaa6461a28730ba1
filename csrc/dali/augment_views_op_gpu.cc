// The operator's GPU backend: the CUDA kernels on DALI's stream. Nothing waits for the GPU.

#include <cstring>

#include "../cuda.h"
#include "augment_views_op.h"
#include "dali/core/cuda_error.h"
#include "dali/kernels/dynamic_scratchpad.h"
#include "gpu_rounds.h"

namespace spd {

using namespace ::dali;  // NOLINT: DALI's enums moved between namespaces

// A copy on the GPU, by way of pinned memory, so that nothing waits for the stream.
template <class T>
static const T* to_gpu(kernels::DynamicScratchpad& scratch, cudaStream_t stream,
                       const std::vector<T>& table) {
    const size_t bytes = table.size() * sizeof(T);
    T* staged = scratch.Allocate<mm::memory_kind::pinned, T>(table.size());
    T* copy = scratch.Allocate<mm::memory_kind::device, T>(table.size());
    memcpy(staged, table.data(), bytes);
    CUDA_CALL(cudaMemcpyAsync(copy, staged, bytes, cudaMemcpyHostToDevice, stream));
    return copy;
}

template <>
void AugmentViews<GPUBackend>::RunImpl(Workspace& ws) {
    const auto& images = ws.Input<GPUBackend>(0);
    auto& out = ws.Output<GPUBackend>(0);
    out.SetLayout(format_.layout());
    const int n = images.num_samples();
    if (n == 0) return;
    DALI_ENFORCE(views_ <= most_views && blur_radius(format_.height) <= most_gpu_radius,
                 "the CUDA kernels take at most 16 views of 339 rows");
    DALI_ENFORCE(out.IsContiguousInMemory(), "the views must be one piece of memory");
    for (size_t i = 0; i < rows_.size(); ++i)
        DALI_ENFORCE(rows_[i].source == rows_[i % views_].source,
                     "one view has different sources in different images");

    std::vector<int64_t> table(3 * size_t(n));
    const auto* first = images.tensor<uint8_t>(0);
    for (int i = 0; i < n; ++i) {
        const auto image = images.shape().tensor_shape_span(i);
        DALI_ENFORCE(image[0] * image[1] * 3 < int64_t(1) << 31,
                     "an image has more than 2^31 bytes");
        table[3 * i] = images.tensor<uint8_t>(i) - first;
        table[3 * i + 1] = image[0], table[3 * i + 2] = image[1];
    }

    kernels::DynamicScratchpad scratch(ws.stream());
    GpuViews target{out.raw_mutable_tensor(0), format_.dtype, {}, {}, {}, views_};
    const auto stride = format_.strides(views_, n);
    std::copy(stride.begin(), stride.end(), target.stride);
    std::copy(format_.scale, format_.scale + 3, target.scale);
    std::copy(format_.shift, format_.shift + 3, target.shift);
    const GpuBatch batch{first,
                         to_gpu(scratch, ws.stream(), table),
                         to_gpu(scratch, ws.stream(), rows_),
                         rows_,
                         n,
                         views_,
                         format_.height,
                         format_.width,
                         target,
                         ws.stream()};
    make_views_on_gpu(batch, [&](size_t bytes) -> void* {
        return scratch.Allocate<mm::memory_kind::device, uint8_t>(bytes, 256);
    });
    const char* error = cuda_launch_error();
    DALI_ENFORCE(!error, std::string("CUDA: ") + error);
}

}  // namespace spd

DALI_REGISTER_OPERATOR(spd__AugmentViews, ::spd::AugmentViews<::dali::GPUBackend>, ::dali::GPU);
