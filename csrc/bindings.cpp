// The Python module spd_fast._C: numpy arrays in, arrays written in place. It checks whatever could
// make the kernels read or write out of bounds, releases the GIL, and spreads the items over
// threads.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "augment_views.h"
#include "kcenter.h"
#include "mahalanobis.h"
#include "nearest.h"
#include "philox.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace py = pybind11;

namespace spd {

// ------------------------------------------------------------------------------ instruction sets

struct Kernels {
    const char* name;
    bool supported;
    bool (*augment_image)(const AugmentArgs&, int64_t);
    void (*mahalanobis)(const MahalanobisArgs&, int64_t, int64_t);
    void (*gaussian_update)(const GaussianUpdateArgs&, int64_t, int64_t);
    int64_t (*gaussian_factor)(const GaussianFactorArgs&, int64_t, int64_t);
    void (*kcenter_begin)(KCenter&);
    void (*kcenter_advance)(KCenter&, int64_t);
    bool (*nearest)(const NearestArgs&, int64_t, int64_t);
};

#define SPD_DECLARE(isa)     \
    SPD_DECLARE_AUGMENT(isa) \
    SPD_DECLARE_GAUSSIAN(isa) SPD_DECLARE_KCENTER(isa) SPD_DECLARE_NEAREST(isa)
#define SPD_KERNELS(isa, name, supported) \
    {name,                                \
     supported,                           \
     isa::augment_image,                  \
     isa::mahalanobis,                    \
     isa::gaussian_update,                \
     isa::gaussian_factor,                \
     isa::kcenter_begin,                  \
     isa::kcenter_advance,                \
     isa::nearest}

#ifdef SPD_HAVE_v2
SPD_DECLARE(v2)
SPD_DECLARE(v3)
SPD_DECLARE(v4)

static bool has_v2() {
    return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
}
static bool has_v3() {
    return has_v2() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt") &&
           __builtin_cpu_supports("movbe");
}
static bool has_v4() {
    return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}
static const Kernels all_kernels[] = {SPD_KERNELS(v4, "x86-64-v4", has_v4()),
                                      SPD_KERNELS(v3, "x86-64-v3", has_v3()),
                                      SPD_KERNELS(v2, "x86-64-v2", has_v2())};
#else
SPD_DECLARE(baseline)
static const Kernels all_kernels[] = {SPD_KERNELS(baseline, "baseline", true)};
#endif

// Chosen once, at import: the best this processor has, or what SPD_FAST_ISA names.
static const Kernels* choose_kernels() {
    const char* asked = std::getenv("SPD_FAST_ISA");
    std::string known;
    for (const Kernels& k : all_kernels) {
        if (k.supported && (!asked || std::string(asked) == k.name)) return &k;
        if (k.supported) known += std::string(known.empty() ? "" : ", ") + k.name;
    }
    throw py::import_error(
        "SPD_FAST_ISA=" + std::string(asked ? asked : "(unset)") +
        " is not available; this processor and build have: " + (known.empty() ? "none" : known));
}
static const Kernels* kernels = nullptr;

// --------------------------------------------------------------------------------------- threads

// Calls body(begin, end) on pieces of `grain` items. One thread needs no OpenMP at all, which keeps
// loader threads, and children of a fork, out of its thread pool.
template <class Body>
static void parallel_for(int64_t items, int64_t grain, int threads, const Body& body) {
    const int64_t pieces = (items + grain - 1) / grain;
#ifdef _OPENMP
    if (threads > 1 && pieces > 1) {
#pragma omp parallel for schedule(dynamic) num_threads(int(std::min<int64_t>(threads, pieces)))
        for (int64_t i = 0; i < pieces; ++i) body(i * grain, std::min(items, (i + 1) * grain));
        return;
    }
#else
    (void)threads;
#endif
    for (int64_t i = 0; i < pieces; ++i) body(i * grain, std::min(items, (i + 1) * grain));
}

// ---------------------------------------------------------------------------------------- checks

static void require(bool condition, const char* message) {  // makes a string only to complain
    if (!condition) throw py::value_error(std::string("spd_fast._C: ") + message);
}

static void require(bool condition, const std::string& message) {
    require(condition, message.c_str());
}

template <class T>
static T* data_of(const py::array& a, const char* name, const std::vector<int64_t>& shape,
                  bool writable = false) {
    const std::string what = name;
    require(py::isinstance<py::array_t<T>>(a), what + " has the wrong dtype");
    require(a.flags() & py::array::c_style, what + " must be C-contiguous");
    require(a.ndim() == int64_t(shape.size()), what + " has the wrong number of dimensions");
    for (size_t i = 0; i < shape.size(); ++i)
        require(a.shape(i) == shape[i], what + ": dimension " + std::to_string(i) + " must be " +
                                            std::to_string(shape[i]) + ", is " +
                                            std::to_string(a.shape(i)));
    require(!writable || a.writeable(), what + " must be writable");
    return const_cast<T*>(static_cast<const T*>(a.data()));
}

static void element_strides(const py::array& a, int64_t* stride) {
    for (int i = 0; i < a.ndim(); ++i) {
        require(a.strides(i) % a.itemsize() == 0, "strides must be whole elements");
        stride[i] = a.strides(i) / a.itemsize();
    }
}

// --------------------------------------------------------------------------------- augment_views

static bool is_whole(float v) { return v == std::floor(v); }

static bool is_inside(float start, float length, float room) {
    return is_whole(start) && is_whole(length) && start >= 0 && length >= 1 &&
           start + length <= room;
}

static bool is_whole_up_to(float value, float most) {
    return is_whole(value) && value >= 0 && value <= most;
}

static bool is_valid(const ViewParams& p, float source_height, float source_width, float height,
                     float width) {
    const float* number = &p.source;
    for (int i = 0; i < view_columns; ++i)
        if (!std::isfinite(number[i])) return false;
    const bool boxes =
        is_inside(p.crop_top, p.crop_height, source_height) &&
        is_inside(p.crop_left, p.crop_width, source_width) &&
        (p.patch_kind == no_patch || (is_inside(p.patch_top, p.patch_height, height) &&
                                      is_inside(p.patch_left, p.patch_width, width) &&
                                      is_inside(p.target_top, p.patch_height, height) &&
                                      is_inside(p.target_left, p.patch_width, width)));
    return boxes && is_whole(p.flip) && is_whole(p.grayscale) && is_whole(p.patch_top) &&
           is_whole(p.patch_left) && is_whole(p.patch_height) && is_whole(p.patch_width) &&
           is_whole(p.target_top) && is_whole(p.target_left) &&
           is_whole_up_to(p.jitter_order, 23) && is_whole_up_to(p.patch_jitter_order, 23) &&
           is_whole_up_to(p.patch_kind, cut_paste) && p.brightness >= 0 && p.contrast >= 0 &&
           p.blur_sigma >= 0 && p.alpha_sigma_y >= 0 && p.alpha_sigma_x >= 0 &&
           (p.patch_kind == no_patch ||
            (p.alpha_sigma_y <= most_alpha_sigma && p.alpha_sigma_x <= most_alpha_sigma));
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
        pixels.push_back(data_of<uint8_t>(buffer, "an image buffer", {buffer.size()}));
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

// ------------------------------------------------------------------------------- random numbers

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

// ---------------------------------------------------------------------------------------- PaDiM

// Owns what `Features` points to.
struct FeatureList {
    std::vector<Layer> layers;
    std::vector<int32_t> layer, channel;
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
                    {}};
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
            channel.push_back(int32_t(kept[k] - first_channel[layer.back()]));
        }
        features = {layers.data(), layer.data(),     channel.data(), int(channels.size()),
                    int(batch),    layers[0].height, layers[0].width};
    }
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
        args.factor_dtype = DType::float16;
        require(factor.ndim() == 2 && factor.shape(0) == shape[0] && factor.shape(1) == shape[1] &&
                    factor.flags() & py::array::c_style,
                "factor has the wrong shape or is not contiguous");
        args.factor = factor.data();
    } else {
        args.factor_dtype = DType::float32;
        args.factor = data_of<float>(factor, "factor", shape);
    }
    args.out = data_of<float>(
        out, "out", {args.features.batch, args.features.grid_height, args.features.grid_width},
        true);
    py::gil_scoped_release release;
    parallel_for(positions, 4 * most_gather_positions, threads,
                 [&](int64_t begin, int64_t end) { kernels->mahalanobis(args, begin, end); });
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
    parallel_for(positions, most_gather_positions, threads,
                 [&](int64_t begin, int64_t end) { kernels->gaussian_update(args, begin, end); });
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
    std::atomic<int64_t> failed{-1};
    py::gil_scoped_release release;
    parallel_for(positions, 4, threads, [&](int64_t begin, int64_t end) {
        const int64_t position = kernels->gaussian_factor(args, begin, end);
        if (position >= 0) failed = position;
    });
    return failed;
}

// ------------------------------------------------------------------------------------- PatchCore

// Fills picks (k,), whose first is the start. `progress` is called with how many are known every
// now and then, and may raise. Returns how many full distances were computed.
static int64_t kcenter(const py::array& points, const py::array& bounds, float slack,
                       const py::array& picks, const py::function& progress) {
    require(points.ndim() == 2 && picks.ndim() == 1, "points must be 2-D, picks 1-D");
    KCenter state{};
    state.n = points.shape(0);
    state.k = picks.shape(0);
    state.d = int(points.shape(1));
    require(state.d % 32 == 0 && state.n < int64_t(1) << 31,
            "points must be (n, d) with d a multiple of 32 and n < 2^31");
    require(state.k >= 1 && state.k <= state.n, "picks must be 1..n");
    state.points = data_of<float>(points, "points", {state.n, state.d});
    state.bounds = data_of<float>(bounds, "bounds", {state.n, kcenter_bounds});
    state.slack = slack;
    state.picks = data_of<int64_t>(picks, "picks", {state.k}, true);
    require(state.picks[0] >= 0 && state.picks[0] < state.n, "the start is out of range");
    const int64_t blocks = (state.k + kcenter_block - 1) / kcenter_block;
    std::vector<Waiting> heap(state.n);
    std::vector<float> pick_bounds(blocks * kcenter_block * kcenter_bounds);
    state.heap = heap.data();
    state.pick_bounds = pick_bounds.data();
    {
        py::gil_scoped_release release;
        kernels->kcenter_begin(state);
    }
    while (state.done < state.k) {
        {
            py::gil_scoped_release release;
            kernels->kcenter_advance(state, std::min(state.k, state.done + 256));
        }
        progress(state.done);
        if (PyErr_CheckSignals()) throw py::error_already_set();  // Ctrl-C
    }
    return state.evaluations;
}

static void nearest_neighbors(const py::array& queries, const py::array& bank,
                              const py::array& query_bounds, const py::array& bank_bounds,
                              float slack, const py::array& distances, const py::array& indices,
                              int threads) {
    require(queries.ndim() == 2 && bank.ndim() == 2 && query_bounds.ndim() == 2 &&
                distances.ndim() == 2,
            "queries, bank, query_bounds and distances must be 2-D");
    NearestArgs args{};
    const int64_t q = queries.shape(0), k = distances.shape(1);
    args.n = bank.shape(0);
    args.d = int(bank.shape(1));
    args.coordinates = int(query_bounds.shape(1));
    args.k = int(k);
    args.slack = slack;
    require(args.d % 32 == 0 && k >= 1 && k <= args.n, "d must be a multiple of 32, k 1..n");
    args.queries = data_of<float>(queries, "queries", {q, args.d});
    args.bank = data_of<float>(bank, "bank", {args.n, args.d});
    args.query_bounds = data_of<float>(query_bounds, "query_bounds", {q, args.coordinates});
    const int64_t blocks = (args.n + nearest_block - 1) / nearest_block;
    args.bank_bounds =
        data_of<float>(bank_bounds, "bank_bounds", {blocks, args.coordinates, nearest_block});
    args.distances = data_of<float>(distances, "distances", {q, k}, true);
    args.indices = data_of<int64_t>(indices, "indices", {q, k}, true);
    std::atomic<bool> out_of_memory{false};
    {
        py::gil_scoped_release release;
        parallel_for(q, 16, threads, [&](int64_t begin, int64_t end) {
            if (!kernels->nearest(args, begin, end)) out_of_memory = true;
        });
    }
    if (out_of_memory) throw std::bad_alloc();
}

// Asks for huge pages behind the array. The first write to a fresh page enters the kernel; with
// 4 KiB pages that takes longer than making the views that are written.
static void advise_huge_pages(const py::array& a) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t huge = 2 << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(a.data()) + huge - 1) / huge * huge;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(a.data()) + a.nbytes()) / huge * huge;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)a;
#endif
}

// Gives the whole pages behind an array back to the system; what was in them is lost.
static void give_back(const py::array& a) {
#ifdef __linux__
    require(a.writeable(), "only memory that may be written to can be given back");
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), at = uintptr_t(a.data());
    const uintptr_t begin = (at + page - 1) / page * page, end = (at + a.nbytes()) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
#else
    (void)a;
#endif
}

static py::dict build_config() {
    py::dict config;
    py::list available;
    for (const Kernels& k : all_kernels)
        if (k.supported) available.append(k.name);
    config["instruction_set"] = kernels->name;
    config["instruction_sets"] = available;
#ifdef _OPENMP
    config["openmp"] = true;
#else
    config["openmp"] = false;
#endif
    config["compiler"] = __VERSION__;
    return config;
}

}  // namespace spd

PYBIND11_MODULE(_C, m) {
    spd::kernels = spd::choose_kernels();
    m.doc() = "CPU kernels of spd_fast; call them through spd_fast.ops.";
    m.def("augment_views", &spd::augment_views);
    m.def("views_are_valid", &spd::views_are_valid);
    m.def("advise_huge_pages", &spd::advise_huge_pages);
    m.def("give_back", &spd::give_back);
    m.def("philox_uniform", &spd::philox_uniform);
    m.def("mahalanobis_map", &spd::mahalanobis_map);
    m.def("gaussian_update", &spd::gaussian_update);
    m.def("gaussian_factor", &spd::gaussian_factor);
    m.def("kcenter", &spd::kcenter);
    m.def("nearest_neighbors", &spd::nearest_neighbors);
    m.def("build_config", &spd::build_config);
}
