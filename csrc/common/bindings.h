// What the bindings of each op, <op>/<op>_bindings.cpp, are written with. They know nothing of
// torch: tensors come as addresses (0 for none), sizes, strides in elements and dtype codes
// (common/dtype.h), checked by the Python caller. The GIL is released while a kernel runs.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>

#include <vector>

namespace py = pybind11;

using NoGil = py::call_guard<py::gil_scoped_release>;

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// What makes the module's functions, of every file that says BINDINGS.
using Bind = void (*)(py::module_&);
std::vector<Bind>& every_bind();

struct Binding {
  explicit Binding(Bind bind) { every_bind().push_back(bind); }
};

// BINDINGS(rope) { m.def("rope", ...); } gives the native module an op's functions.
#define BINDINGS(op)                            \
  static void bind_##op(py::module_& m);        \
  static const Binding binding_##op(bind_##op); \
  static void bind_##op(py::module_& m)
