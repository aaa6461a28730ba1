// PatchCore: greedy k-center and nearest neighbours.

#include <atomic>
#include <cfloat>
#include <cmath>
#include <memory>

#include "bindings.h"

namespace spd {

// Begins at a cache line. Not initialised: what fills it touches every page anyway.
template <class T>
static std::unique_ptr<T, decltype(&free)> new_array(int64_t size) {
    const size_t bytes = (size * sizeof(T) + 63) / 64 * 64;
    T* array = static_cast<T*>(aligned_alloc(64, bytes));
    if (!array) throw std::bad_alloc();
    return {array, &free};
}

template <class T>
static std::unique_ptr<T, decltype(&free)> new_array(int64_t size, T value) {
    auto array = new_array<T>(size);
    std::fill_n(array.get(), size, value);
    return array;
}

// Where bytes have to reach: their origin (d,), and how far from it coordinates are. A sample of
// the points tells, without its outermost twentieth: of those coordinates are cut off, and bytes
// are finer for all others. Infinite if numbers of the sample are not finite.
static std::pair<py::array_t<float>, float> reach_of_bytes(const py::array& points, int sample) {
    require(points.ndim() == 2 && points.size() > 0 && sample > 0,
            "points must be 2-D and not empty, sample at least 1");
    const int64_t d = points.shape(1), step = (points.shape(0) + sample - 1) / sample;
    const int64_t count = (points.shape(0) + step - 1) / step;
    const float* first = data_of<float>(points, "points", {points.shape(0), d});
    py::array_t<float> origin(d);
    float* mean = origin.mutable_data();
    std::vector<float> sizes(count, 0.f);  // largest coordinates, once there is an origin

    const auto move_origin = [&](float limit) {  // to the mean of those that are not larger
        std::fill_n(mean, d, 0.f);
        int64_t inner = 0;
        for (int64_t i = 0; i < count; ++i)
            if (sizes[i] <= limit) {
                const float* point = first + i * step * d;
                for (int64_t c = 0; c < d; ++c) mean[c] += point[c];
                ++inner;
            }
        for (int64_t c = 0; c < d; ++c) mean[c] /= float(inner);
    };
    const auto size_of = [&](int64_t i) {
        const float* point = first + i * step * d;
        float size = 0;
        bool finite = true;
        for (int64_t c = 0; c < d; ++c) {
            const float distance = std::abs(point[c] - mean[c]);
            finite &= distance <= FLT_MAX;
            size = std::max(size, distance);
        }
        return finite ? size : INFINITY;
    };

    move_origin(0);  // of all
    for (int64_t i = 0; i < count; ++i) sizes[i] = size_of(i);
    std::vector<float> ordered = sizes;
    const auto last = ordered.begin() + (95 * count + 99) / 100 - 1;
    std::nth_element(ordered.begin(), last, ordered.end());
    if (!(*last <= FLT_MAX)) return {origin, INFINITY};
    move_origin(*last);
    float reach = 1e-30f;  // its inverse must be finite
    for (int64_t i = 0; i < count; ++i)
        if (sizes[i] <= *last) reach = std::max(reach, size_of(i));
    return {origin, reach};
}

// Fills picks (k,), whose first is the start. Bytes are exact to 1 / 126 of `reach` for coordinates
// not farther from the origin than that. `progress` is called with how many are known every
// now and then, and may raise. Returns how many full distances were computed, or -1 and no picks if
// a coordinate is not a number or larger than `largest`, of which squares must be finite.
static int64_t greedy_kcenter(const py::array& points, const py::array& origin, float reach,
                              float largest, const py::array& picks, const py::function& progress) {
    require(points.ndim() == 2 && picks.ndim() == 1, "points must be 2-D, picks 1-D");
    KCenter state{};
    state.n = points.shape(0);
    state.k = picks.shape(0);
    require(points.shape(1) >= 1 && points.shape(1) <= 65536 && state.n < int64_t(1) << 31,
            "points must be (n, d) with d = 1..65536 and n < 2^31");
    require(state.k >= 1 && state.k <= state.n, "picks must be 1..n");
    require(reach >= 1e-30f && reach <= FLT_MAX, "the reach must be at least 1e-30 and finite");
    state.d = int(points.shape(1));
    state.bytes = (state.d + kcenter_bytes - 1) / kcenter_bytes * kcenter_bytes;
    state.points = data_of<float>(points, "points", {state.n, state.d});
    state.origin = data_of<float>(origin, "origin", {state.d});
    state.scale = kcenter_largest_byte / reach;
    state.picks = data_of<int64_t>(picks, "picks", {state.k}, true);
    require(state.picks[0] >= 0 && state.picks[0] < state.n, "the start is out of range");
    const int64_t room = (state.k + kcenter_block - 1) / kcenter_block * kcenter_block;
    const int64_t groups = (state.n + kcenter_group - 1) / kcenter_group;
    const auto distances = new_array<float>(groups * kcenter_group);
    const auto peaks = new_array<float>(groups);
    const auto seen = new_array<int32_t>(state.n), in_bytes = new_array<int32_t>(state.n);
    const auto near_pick = new_array<int32_t>(state.n + 2);
    const auto point_bytes = new_array<uint8_t>(state.n * state.bytes);
    const auto infos = new_array<ByteInfo>(state.n);
    const auto pick_bytes = new_array<int8_t>(room * state.bytes, 0);
    const auto pick_squares = new_array<int32_t>(room, 0);
    const auto pick_errors = new_array<float>(room, 0);
    const auto pick_first_bytes = new_array<int8_t>(room * kcenter_first_bytes, 0);
    const auto pick_first_squares = new_array<int32_t>(room, kcenter_no_pick);
    state.distances = distances.get();
    state.peaks = peaks.get();
    state.seen = seen.get();
    state.in_bytes = in_bytes.get();
    state.near_pick = near_pick.get() + 1;
    state.point_bytes = point_bytes.get();
    state.infos = infos.get();
    state.pick_bytes = pick_bytes.get();
    state.pick_squares = pick_squares.get();
    state.pick_errors = pick_errors.get();
    state.pick_first_bytes = pick_first_bytes.get();
    state.pick_first_squares = pick_first_squares.get();
    {
        py::gil_scoped_release release;
        if (!kernels->kcenter_begin(state, largest)) return -1;
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
    require(k >= 1 && k <= args.n, "k must be 1..n");
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
            if (!kernels->nearest_neighbors(args, begin, end)) out_of_memory = true;
        });
    }
    if (out_of_memory) throw std::bad_alloc();
}

void bind_patchcore(py::module_& m) {
    m.def("reach_of_bytes", &reach_of_bytes);
    m.def("greedy_kcenter", &greedy_kcenter);
    m.def("nearest_neighbors", &nearest_neighbors);
}

}  // namespace spd
