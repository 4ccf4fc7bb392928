// Shared by the bindings: one bind_*.cpp a subject, all in one Python module.

#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>

namespace megatron_plm {

namespace py = pybind11;

template <typename Value>
py::array_t<Value> to_numpy(const Value* begin, std::size_t size) {
    return py::array_t<Value>(static_cast<py::ssize_t>(size), begin);
}

void bind_fasta(py::module_& module);
void bind_hashing(py::module_& module);
void bind_lines(py::module_& module);
void bind_rows(py::module_& module);

}  // namespace megatron_plm
