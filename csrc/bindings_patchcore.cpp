// PatchCore: greedy k-center and nearest neighbours.

#include <atomic>

#include "bindings.h"

namespace spd {

// Fills picks (k,), whose first is the start. `progress` is called with how many are known every
// now and then, and may raise. Returns how many full distances were computed.
static int64_t greedy_kcenter(const py::array& points, const py::array& bounds, float slack,
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
            if (!kernels->nearest_neighbors(args, begin, end)) out_of_memory = true;
        });
    }
    if (out_of_memory) throw std::bad_alloc();
}

void bind_patchcore(py::module_& m) {
    m.def("greedy_kcenter", &greedy_kcenter);
    m.def("nearest_neighbors", &nearest_neighbors);
}

}  // namespace spd
