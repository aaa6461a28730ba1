// The Python module spd_fast._sort. Apart from _C, as the exact metrics need neither torch nor its
// OpenMP, which has to be loaded before _C is.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "radix_sort.h"

namespace py = pybind11;

template <class Float, class Word>
static void sort(py::array_t<Float, py::array::c_style>& values,
                 py::array_t<Float, py::array::c_style>& scratch) {
    static_assert(sizeof(Float) == sizeof(Word), "a word holds the bits of one number");
    if (values.ndim() != 1 || scratch.ndim() != 1 || values.size() != scratch.size())
        throw py::value_error("values and scratch must have one dimension and the same length");
    void *bits = values.mutable_data(), *other = scratch.mutable_data();
    if (bits == other) throw py::value_error("values and scratch must be different arrays");
    py::gil_scoped_release release;
    spd::radix_sort(static_cast<Word*>(bits), static_cast<Word*>(other), size_t(values.size()));
}

PYBIND11_MODULE(_sort, m) {
    m.doc() = "Sorts float32 and float64 numbers, none of them NaN, in place; -0 before 0.";
    m.def("sort", &sort<float, uint32_t>, py::arg("values").noconvert(),
          py::arg("scratch").noconvert());
    m.def("sort", &sort<double, uint64_t>, py::arg("values").noconvert(),
          py::arg("scratch").noconvert());
}
