// The CUDA kernels. Tensors cross as addresses on the device, checked in spd_fast/ops; work goes to
// the stream that is given.

#include "bindings.h"
#include "cuda.h"

namespace spd {

template <class T>
static T* at(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

// (address, (channels, height, width), strides of image, channel, row and column)
using LayerTuple = std::tuple<uint64_t, std::array<int, 3>, std::array<int64_t, 4>>;

static FactorType factor_type_of(const std::string& name) {
    if (name == "float32") return FactorType::float32;
    if (name == "float16") return FactorType::float16;
    require(name == "bfloat16", "no " + name + " factor in CUDA");
    return FactorType::bfloat16;
}

static void cuda_mahalanobis_map(const std::vector<LayerTuple>& layers, uint64_t channels,
                                 uint64_t mean, uint64_t factor, const std::string& factor_type,
                                 int d, int batch, int grid_height, int grid_width, uint64_t out,
                                 uint64_t stream) {
    require(layers.size() <= most_layers && batch <= most_images && d <= most_channels,
            "more layers, images or channels than the CUDA kernel takes");
    GpuMahalanobisArgs args{};
    for (const auto& [address, size, stride] : layers) {
        Layer& layer = args.layer[args.layers++];
        layer = {at<const float>(address), size[0], size[1], size[2], {}, nullptr, nullptr};
        std::copy(stride.begin(), stride.end(), layer.stride);
    }
    args.channels = at<const int64_t>(channels);
    args.d = d;
    args.batch = batch;
    args.grid_height = grid_height;
    args.grid_width = grid_width;
    args.mean = at<const float>(mean);
    args.factor = at<const void>(factor);
    args.factor_type = factor_type_of(factor_type);
    args.out = at<float>(out);
    args.stream = at<void>(stream);
    mahalanobis_cuda(args);
    if (const char* error = cuda_launch_error())
        throw std::runtime_error(std::string("CUDA: ") + error);
}

std::string cuda_config() {
    const CudaState state = cuda_state();
    const auto dotted = [](int version) {
        return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
    };
    std::string text = "runtime " + dotted(state.runtime);
    text += state.driver ? ", driver " + dotted(state.driver) : ", no driver";
    text += state.devices ? ", devices: " + std::to_string(state.devices) : ", no device";
    return *state.error ? text + " (" + state.error + ")" : text;
}

void bind_cuda(py::module_& m) { m.def("cuda_mahalanobis_map", &cuda_mahalanobis_map); }

}  // namespace spd
