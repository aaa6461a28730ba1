// PaDiM: distances to the Gaussians of a grid, and fitting them.

#include <atomic>

#include "bindings.h"

namespace spd {

// Owns what `Features` points to.
struct FeatureList {
    std::vector<Layer> layers;
    std::vector<int32_t> layer, end;
    std::vector<int64_t> channel;
    std::vector<int64_t> places;  // of the rows and columns of all layers
    Features features{};

    FeatureList(const std::vector<py::array>& maps, const py::array& channels) {
        require(!maps.empty(), "no feature map");
        const int64_t batch = maps[0].ndim() == 4 ? maps[0].shape(0) : -1;
        std::vector<int64_t> first_channel{0};
        for (const py::array& map : maps) {
            require(map.ndim() == 4 && py::isinstance<py::array_t<float>>(map) &&
                        map.shape(0) == batch && map.shape(2) > 0 && map.shape(3) > 0,
                    "feature maps must be float32 (B, C, H, W) with one B");
            Layer l{static_cast<const float*>(map.data()),
                    int(map.shape(1)),
                    int(map.shape(2)),
                    int(map.shape(3)),
                    {},
                    nullptr,
                    nullptr,
                    1};
            element_strides(map, l.stride);
            layers.push_back(l);
            first_channel.push_back(first_channel.back() + map.shape(1));
        }
        const int64_t* kept = data_of<int64_t>(channels, "channels", {channels.size()});
        for (int64_t k = 0; k < channels.size(); ++k) {
            require(kept[k] >= 0 && kept[k] < first_channel.back(), "a channel is out of range");
            const auto after =
                std::upper_bound(first_channel.begin(), first_channel.end(), kept[k]);
            layer.push_back(int32_t(after - first_channel.begin() - 1));
            channel.push_back((kept[k] - first_channel[layer.back()]) *
                              layers[layer.back()].stride[1]);
        }
        end.resize(layer.size());
        for (size_t k = layer.size(); k-- > 0;)
            end[k] = k + 1 < layer.size() && layer[k + 1] == layer[k] ? end[k + 1] : int32_t(k + 1);
        const int height = layers[0].height, width = layers[0].width;
        features = {layers.data(),        layer.data(), end.data(), channel.data(),
                    int(channels.size()), int(batch),   height,     width};
        places.resize(layers.size() * (height + width));
        int64_t* next = places.data();
        const auto nearest = [&](int of_grid, int of_layer, int64_t stride) {
            const int64_t* table = next;
            for (int64_t i = 0; i < of_grid; ++i) *next++ = i * of_layer / of_grid * stride;
            return table;
        };
        for (Layer& l : layers) {
            l.row = nearest(height, l.height, l.stride[2]);
            l.column = nearest(width, l.width, l.stride[3]);
            l.cell = std::max(width / l.width, 1);
        }
    }
    FeatureList(const FeatureList&) = delete;  // a copy's pointers would be the original's
    int64_t positions() const { return int64_t(features.grid_height) * features.grid_width; }
};

static void mahalanobis_map(const std::vector<py::array>& maps, const py::array& channels,
                            const py::array& mean, const py::array& factor, const py::array& out,
                            int threads) {
    const FeatureList list(maps, channels);
    MahalanobisArgs args{};
    args.features = list.features;
    const int64_t positions = list.positions(), d = args.features.d;
    args.mean = data_of<float>(mean, "mean", {positions, d});
    const std::vector<int64_t> shape{positions, int64_t(packed_size(int(d)))};
    if (factor.dtype().kind() == 'f' && factor.itemsize() == 2) {
        args.factor_type = FactorType::float16;
        require(factor.ndim() == 2 && factor.shape(0) == shape[0] && factor.shape(1) == shape[1] &&
                    factor.flags() & py::array::c_style,
                "factor has the wrong shape or is not contiguous");
        args.factor = factor.data();
    } else if (py::isinstance<py::array_t<int8_t>>(factor)) {
        args.factor_type = FactorType::int8;
        args.factor =
            data_of<int8_t>(factor, "factor", {positions, int64_t(quantized_size(int(d)))});
    } else {
        args.factor_type = FactorType::float32;
        args.factor = data_of<float>(factor, "factor", shape);
    }
    args.out = data_of<float>(
        out, "out", {args.features.batch, args.features.grid_height, args.features.grid_width},
        true);
    py::gil_scoped_release release;
    std::atomic<bool> out_of_memory{false};
    const int64_t tiles = int64_t(tiles_down(list.features)) * tiles_across(list.features);
    parallel_for(tiles, 1, threads, [&](int64_t begin, int64_t end) {
        if (!kernels->mahalanobis(args, begin, end)) out_of_memory = true;
    });
    if (out_of_memory) throw std::bad_alloc();
}

static void gaussian_update(const std::vector<py::array>& maps, const py::array& channels,
                            int64_t count, const py::array& mean, const py::array& scatter,
                            int threads) {
    const FeatureList list(maps, channels);
    const int64_t positions = list.positions(), d = list.features.d;
    require(count >= 0, "count must not be negative");
    const GaussianUpdateArgs args{
        list.features, count, data_of<float>(mean, "mean", {positions, d}, true),
        data_of<float>(scatter, "scatter", {positions, int64_t(packed_size(int(d)))}, true)};
    py::gil_scoped_release release;
    std::atomic<bool> out_of_memory{false};
    parallel_for(positions, planar_positions, threads, [&](int64_t begin, int64_t end) {
        if (!kernels->gaussian_update(args, begin, end)) out_of_memory = true;
    });
    if (out_of_memory) throw std::bad_alloc();
}

// Returns a position whose covariance is not positive definite, or -1.
static int64_t gaussian_factor(const py::array& scatter, int d, int64_t count, float ridge,
                               int threads) {
    require(scatter.ndim() == 2 && d >= 1 && count >= 2,
            "scatter must be 2-D, d at least 1, count at least 2");
    const int64_t positions = scatter.shape(0);
    const GaussianFactorArgs args{
        data_of<float>(scatter, "scatter", {positions, int64_t(packed_size(d))}, true), d, count,
        ridge};
    std::atomic<int64_t> failed{all_positive};
    py::gil_scoped_release release;
    parallel_for(positions, 4, threads, [&](int64_t begin, int64_t end) {
        const int64_t position = kernels->gaussian_factor(args, begin, end);
        if (position != all_positive) failed = position;
    });
    if (failed == no_memory) throw std::bad_alloc();
    return failed;
}

void bind_padim(py::module_& m) {
    m.def("mahalanobis_map", &mahalanobis_map);
    m.def("gaussian_update", &gaussian_update);
    m.def("gaussian_factor", &gaussian_factor);
}

}  // namespace spd
