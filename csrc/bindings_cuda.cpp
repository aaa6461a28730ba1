// The CUDA kernels. Tensors cross as addresses on the device, checked in spd_fast/ops; work goes to
// the stream that is given.

#include <optional>

#include "bindings.h"
#include "cuda.h"

namespace spd {

template <class T>
static T* at(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

static void throw_launch_error() {
    if (const char* error = cuda_launch_error())
        throw std::runtime_error(std::string("CUDA: ") + error);
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
        layer = {at<const float>(address), size[0], size[1], size[2], {}, nullptr, nullptr, 0};
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
    throw_launch_error();
}

static DType dtype_of(const std::string& name) {
    if (name == "float32") return DType::float32;
    if (name == "float16") return DType::float16;
    if (name == "bfloat16") return DType::bfloat16;
    require(name == "uint8", "views of " + name);
    return DType::uint8;
}

// (address, dtype, strides in elements, scale and shift of each channel, how many views)
using ViewsTuple = std::tuple<uint64_t, std::string, std::array<int64_t, 5>, std::array<float, 3>,
                              std::array<float, 3>, int>;

static GpuViews views_of(const ViewsTuple& tuple) {
    const auto& [address, dtype, stride, scale, shift, count] = tuple;
    GpuViews views{at<void>(address), dtype_of(dtype), {}, {}, {}, count};
    std::copy(stride.begin(), stride.end(), views.stride);
    std::copy(scale.begin(), scale.end(), views.scale);
    std::copy(shift.begin(), shift.end(), views.shift);
    return views;
}

static void cuda_augment_round(const std::vector<int>& made, uint64_t pixels, uint64_t images,
                               uint64_t params, int n_images, int views, int height, int width,
                               const std::optional<ViewsTuple>& source, const ViewsTuple& target,
                               const ViewsTuple& fine, uint64_t scratch, bool packed, uint64_t sums,
                               int tiles, uint64_t boxes, int room, bool paste_fine,
                               uint64_t stream) {
    require(made.size() <= most_views && blur_radius(height) <= most_gpu_radius,
            "more views, or higher ones, than the CUDA kernels take");
    GpuRoundArgs args{};
    std::copy(made.begin(), made.end(), args.view);
    args.views_made = int(made.size());
    args.pixels = at<const uint8_t>(pixels);
    args.images = at<const int64_t>(images);
    args.params = at<const ViewParams>(params);
    args.n_images = n_images;
    args.views = views;
    args.height = height;
    args.width = width;
    args.tiles = (height + view_tile_y - 1) / view_tile_y;
    require(tiles == args.tiles, "sums of tiles of another size");
    args.from_images = !source;
    if (source) args.source = views_of(*source);
    args.target = views_of(target);
    args.fine = views_of(fine);
    args.scratch = at<void>(scratch);
    args.packed = packed;
    args.sums = at<float>(sums);
    args.boxes = at<float>(boxes);
    args.room = room;
    args.paste_fine = paste_fine;
    args.stream = at<void>(stream);
    augment_round_cuda(args);
    throw_launch_error();
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

void bind_cuda(py::module_& m) {
    m.def("cuda_augment_round", &cuda_augment_round);
    m.def("cuda_mahalanobis_map", &cuda_mahalanobis_map);
}

}  // namespace spd
