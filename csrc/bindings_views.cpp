// augment_views and the random numbers behind its parameters.

#include <atomic>
#include <cmath>

#include "bindings.h"
#include "philox.h"

namespace spd {

static bool is_whole(float v) { return v == std::floor(v); }

static bool is_inside(float start, float length, float room) {
    return start >= 0 && length >= 1 && start + length <= room;
}

static bool is_valid(const ViewParams& p, float source_height, float source_width, float height,
                     float width) {
    const float* number = &p.source;
    for (int i = 0; i < view_columns; ++i)
        if (!std::isfinite(number[i])) return false;
    for (const float v :
         {p.source, p.crop_top, p.crop_left, p.crop_height, p.crop_width, p.flip, p.jitter_order,
          p.grayscale, p.patch_kind, p.patch_top, p.patch_left, p.patch_height, p.patch_width,
          p.target_top, p.target_left, p.patch_jitter_order})
        if (!is_whole(v)) return false;
    for (const float v : {p.jitter_order, p.patch_kind, p.patch_jitter_order, p.brightness,
                          p.contrast, p.blur_sigma, p.alpha_sigma_y, p.alpha_sigma_x})
        if (v < 0) return false;
    if (p.jitter_order > 23 || p.patch_jitter_order > 23 || p.patch_kind > cut_paste ||
        !is_inside(p.crop_top, p.crop_height, source_height) ||
        !is_inside(p.crop_left, p.crop_width, source_width))
        return false;
    return p.patch_kind == no_patch ||
           (p.alpha_sigma_y <= most_alpha_sigma && p.alpha_sigma_x <= most_alpha_sigma &&
            is_inside(p.patch_top, p.patch_height, height) &&
            is_inside(p.patch_left, p.patch_width, width) &&
            is_inside(p.target_top, p.patch_height, height) &&
            is_inside(p.target_left, p.patch_width, width));
}

// Whether all views can be made, in some order. What is wrong is for Python to explain.
static bool are_valid(const AugmentArgs& args, const std::vector<int64_t>& buffer_sizes) {
    std::vector<bool> made(args.views);
    for (int64_t n = 0; n < args.images; ++n) {
        const int64_t* at = args.layout + 4 * n;
        const int64_t buffer = at[0], offset = at[1], height = at[2], width = at[3];
        if (buffer < 0 || buffer >= int64_t(buffer_sizes.size()) || offset < 0 || height < 1 ||
            width < 1 || height >= most_side || width >= most_side ||
            offset > buffer_sizes[buffer] || height * width * 3 > buffer_sizes[buffer] - offset)
            return false;
        const ViewParams* rows = args.params + n * args.views;
        for (int v = 0; v < args.views; ++v) {
            const float source = rows[v].source;
            if (!(is_whole(source) && source >= -1 && source < args.views)) return false;
            const bool from_image = source < 0;
            if (!is_valid(rows[v], from_image ? height : args.height,
                          from_image ? width : args.width, args.height, args.width))
                return false;
        }
        made.assign(args.views, false);
        int left = args.views;
        for (bool progress = true; progress;) {
            progress = false;
            for (int v = 0; v < args.views; ++v) {
                const int source = int(rows[v].source);
                if (made[v] || (source >= 0 && !made[source])) continue;
                made[v] = progress = true;
                --left;
            }
        }
        if (left) return false;  // the sources of the views form a circle
    }
    return true;
}

static bool views_are_valid(const std::vector<int64_t>& buffer_sizes, const py::array& layout,
                            const py::array& params, int height, int width) {
    require(params.ndim() == 3, "params must be 3-D");
    AugmentArgs args{};
    args.images = params.shape(0);
    args.views = int(params.shape(1));
    args.height = height;
    args.width = width;
    args.layout = data_of<int64_t>(layout, "layout", {args.images, 4});
    args.params = reinterpret_cast<const ViewParams*>(
        data_of<float>(params, "params", {args.images, args.views, view_columns}));
    return are_valid(args, buffer_sizes);
}

static DType set_output(const py::array& out, const std::string& dtype) {
    require(out.writeable(), "out must be writable");
    if (dtype == "float32" && py::isinstance<py::array_t<float>>(out)) return DType::float32;
    if (dtype == "float16" && out.dtype().kind() == 'f' && out.itemsize() == 2)
        return DType::float16;
    if (dtype == "bfloat16" && py::isinstance<py::array_t<uint16_t>>(out)) return DType::bfloat16;
    require(dtype == "uint8" && py::isinstance<py::array_t<uint8_t>>(out),
            "out's dtype does not match " + dtype);
    return DType::uint8;
}

static void augment_views(const std::vector<py::array>& buffers, const py::array& layout,
                          const py::array& params, const py::array& out, const std::string& dtype,
                          const std::vector<float>& mean, const std::vector<float>& std,
                          int threads) {
    require(out.ndim() == 5 && mean.size() == 3 && std.size() == 3,
            "out must be 5-D, mean and std need 3 values");
    AugmentArgs args{};
    args.views = int(out.shape(0));
    args.images = out.shape(1);
    args.height = int(out.shape(3));
    args.width = int(out.shape(4));
    require(out.shape(2) == 3 && args.height > 0 && args.width > 0 && out.shape(3) < most_side &&
                out.shape(4) < most_side,
            "out must be (V, N, 3, H, W) with 0 < H, W < 2^24");
    args.layout = data_of<int64_t>(layout, "layout", {args.images, 4});
    args.params = reinterpret_cast<const ViewParams*>(
        data_of<float>(params, "params", {args.images, args.views, view_columns}));
    std::vector<const uint8_t*> pixels;
    std::vector<int64_t> sizes;
    for (const py::array& buffer : buffers) {
        require(py::isinstance<py::array_t<uint8_t>>(buffer) && buffer.flags() & py::array::c_style,
                "an image buffer must be contiguous uint8");
        pixels.push_back(static_cast<const uint8_t*>(buffer.data()));
        sizes.push_back(buffer.size());
    }
    args.buffers = pixels.data();
    require(are_valid(args, sizes), "an image or a row of parameters is not valid");
    args.dtype = set_output(out, dtype);
    args.out = const_cast<void*>(out.data());
    element_strides(out, args.stride);
    for (int c = 0; c < 3; ++c) {
        args.scale[c] = 1 / std[c];
        args.shift[c] = -mean[c] / std[c];
    }
    std::atomic<bool> out_of_memory{false};
    {
        py::gil_scoped_release release;
        parallel_for(args.images, 1, threads, [&](int64_t begin, int64_t end) {
            for (int64_t n = begin; n < end; ++n)
                if (!kernels->augment_image(args, n)) out_of_memory = true;
        });
    }
    if (out_of_memory) throw std::bad_alloc();  // MemoryError in Python
}

// What numpy's Philox(key=[seed, 0], counter=[0, view, index, epoch]) draws first, as numbers in
// [0, 1): out is (indices, views, draws).
static void philox_uniform(uint64_t seed, uint64_t epoch, const py::array& indices,
                           const py::array& views, const py::array& out) {
    require(out.ndim() == 3 && out.shape(2) % 4 == 0, "out must be 3-D, in blocks of 4 draws");
    const int64_t n = out.shape(0), v = out.shape(1), blocks = out.shape(2) / 4;
    const int64_t* index = data_of<int64_t>(indices, "indices", {n});
    const int64_t* view = data_of<int64_t>(views, "views", {v});
    double* draw = data_of<double>(out, "out", {n, v, 4 * blocks}, true);
    for (int64_t i = 0; i < n * v; ++i) {
        const uint64_t counter[4] = {0, uint64_t(view[i % v]), uint64_t(index[i / v]), epoch};
        for (int64_t b = 0; b < blocks; ++b, draw += 4) uniform_block(counter, b, seed, draw);
    }
}

void bind_views(py::module_& m) {
    m.def("augment_views", &augment_views);
    m.def("views_are_valid", &views_are_valid);
    m.def("philox_uniform", &philox_uniform);
}

}  // namespace spd
