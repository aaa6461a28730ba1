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
    const size_t n = values.size();
    auto* bits = static_cast<Word*>(static_cast<void*>(values.mutable_data()));
    auto* other = static_cast<Word*>(static_cast<void*>(scratch.mutable_data()));
    if (bits < other + n && other < bits + n)
        throw py::value_error("values and scratch must not overlap");
    py::gil_scoped_release release;
    spd::radix_sort(bits, other, n);
}

PYBIND11_MODULE(_sort, m) {
    m.doc() = "Sorts float32 and float64 numbers, none of them NaN, in place; -0 before 0.";
    m.def("sort", &sort<float, uint32_t>, py::arg("values").noconvert(),
          py::arg("scratch").noconvert());
    m.def("sort", &sort<double, uint64_t>, py::arg("values").noconvert(),
          py::arg("scratch").noconvert());
}
