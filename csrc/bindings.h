// What the files of the Python module share. Only they know Python; everything in them may use the
// standard library, since they are compiled once.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "augment_views.h"
#include "kcenter.h"
#include "mahalanobis.h"
#include "nearest.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace spd {

struct Kernels {
    const char* name;
    const char* flags_of_views;  // augment_views.cpp was compiled with these
    bool supported;
    bool (*augment_image)(const AugmentArgs&, int64_t);
    bool (*mahalanobis)(const MahalanobisArgs&, int64_t, int64_t);
    bool (*gaussian_update)(const GaussianUpdateArgs&, int64_t, int64_t);
    int64_t (*gaussian_factor)(const GaussianFactorArgs&, int64_t, int64_t);
    bool (*kcenter_begin)(KCenter&, float);
    void (*kcenter_advance)(KCenter&, int64_t);
    bool (*nearest_neighbors)(const NearestArgs&, int64_t, int64_t);
};

extern const Kernels* kernels;  // chosen at import

void bind_views(py::module_& m);
void bind_padim(py::module_& m);
void bind_patchcore(py::module_& m);
#ifdef SPD_HAVE_CUDA
void bind_cuda(py::module_& m);
std::string cuda_config();  // what it was built with and finds
#endif

// --------------------------------------------------------------------------------------- threads

// Calls body(begin, end) on pieces of `grain` items. One thread needs no OpenMP at all, which keeps
// loader threads, and children of a fork, out of its thread pool.
template <class Body>
inline void parallel_for(int64_t items, int64_t grain, int threads, const Body& body) {
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

inline void require(bool condition, const char* message) {  // makes a string only to complain
    if (!condition) throw py::value_error(std::string("spd_fast._C: ") + message);
}

inline void require(bool condition, const std::string& message) {
    require(condition, message.c_str());
}

template <class T>
inline T* data_of(const py::array& a, const char* name, const std::vector<int64_t>& shape,
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

inline void element_strides(const py::array& a, int64_t* stride) {
    for (int i = 0; i < a.ndim(); ++i) {
        require(a.strides(i) % a.itemsize() == 0, "strides must be whole elements");
        stride[i] = a.strides(i) / a.itemsize();
    }
}

}  // namespace spd
