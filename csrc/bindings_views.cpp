// augment_views and the random numbers behind its parameters.

#include <atomic>

#include "bindings.h"
#include "view_params.h"
#include "views_check.h"

namespace spd {

// Whether all views can be made, in some order. What is wrong is for Python to explain.
static bool are_valid(const AugmentArgs& args, const std::vector<int64_t>& buffer_sizes) {
    for (int64_t n = 0; n < args.images; ++n) {
        const int64_t* at = args.layout + 4 * n;
        const int64_t buffer = at[0], offset = at[1], height = at[2], width = at[3];
        if (buffer < 0 || buffer >= int64_t(buffer_sizes.size()) || offset < 0 || height < 1 ||
            width < 1 || height >= most_side || width >= most_side ||
            offset > buffer_sizes[buffer] || height * width * 3 > buffer_sizes[buffer] - offset)
            return false;
        if (!rows_are_valid(args.params + n * args.views, args.views, float(height), float(width),
                            float(args.height), float(args.width)))
            return false;
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

// Rows (indices, views, columns) of images of sizes (indices, 2), from a table of ranges (views,
// range_columns).
static void draw_view_rows(const py::array& ranges, const py::array& sizes,
                           const py::array& indices, uint64_t epoch, uint64_t seed, int height,
                           int width, const py::array& out) {
    require(out.ndim() == 3, "out must be 3-D");
    const int64_t n = out.shape(0), v = out.shape(1);
    const auto* range =
        reinterpret_cast<const ViewRanges*>(data_of<double>(ranges, "ranges", {v, range_columns}));
    const int64_t* size = data_of<int64_t>(sizes, "sizes", {n, 2});
    const int64_t* index = data_of<int64_t>(indices, "indices", {n});
    auto* rows =
        reinterpret_cast<ViewParams*>(data_of<float>(out, "out", {n, v, view_columns}, true));
    for (int64_t i = 0; i < n; ++i)
        draw_views(range, int(v), seed, epoch, uint64_t(index[i]), double(size[2 * i]),
                   double(size[2 * i + 1]), height, width, rows + i * v);
}

void bind_views(py::module_& m) {
    m.def("draw_view_rows", &draw_view_rows);
    m.def("augment_views", &augment_views);
    m.def("views_are_valid", &views_are_valid);
}

}  // namespace spd
