// The native module: what Python may call. It knows nothing of torch: tensors come as addresses,
// sizes, strides in elements and dtype codes (common/dtype.h), checked by the Python caller.
// The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>

#include "adamw/adamw_cpu.h"
#include "common/cpu.h"
#include "common/parallel.h"
#include "rms_norm/rms_norm_cpu.h"

namespace py = pybind11;

namespace {

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (int level = 0; level <= int(best_isa()); ++level) names.push_back(kIsaNames[level]);
  return names;
}

void set_isa(const std::string& name) {
  for (int level = 0; level <= int(best_isa()); ++level)
    if (name == kIsaNames[level]) return set_current_isa(Isa(level));
  throw py::value_error("set_isa: this machine has no instruction set level '" + name + "'");
}

void rms_norm_forward_binding(uintptr_t x, int64_t x_stride, uintptr_t residual,
                              int64_t residual_stride, uintptr_t weight, uintptr_t y, uintptr_t h,
                              uintptr_t rstd, int64_t rows, int64_t cols, double eps, int x_dtype,
                              int weight_dtype, int threads) {
  const RmsNormForward a{pointer(x), pointer(residual),    pointer(weight), pointer(y),
                         pointer(h), pointer<float>(rstd), x_stride,        residual_stride,
                         cols,       eps};
  rms_norm_forward(a, rows, x_dtype, weight_dtype, threads);
}

void rms_norm_backward_binding(uintptr_t dy, int64_t dy_stride, uintptr_t dh, int64_t dh_stride,
                               uintptr_t h, int64_t h_stride, uintptr_t weight, uintptr_t rstd,
                               uintptr_t dx, uintptr_t partial, uintptr_t dweight, int64_t rows,
                               int64_t cols, int x_dtype, int weight_dtype, int threads) {
  const RmsNormBackward a{pointer(dy),
                          pointer(dh),
                          pointer(h),
                          pointer(weight),
                          pointer<float>(rstd),
                          pointer(dx),
                          pointer<float>(partial),
                          pointer(dweight),
                          dy_stride,
                          dh_stride,
                          h_stride,
                          rows,
                          cols};
  rms_norm_backward(a, x_dtype, weight_dtype, threads);
}

// One row per tensor: param, grad, exp_avg, exp_avg_sq, numel, param dtype, grad dtype, and the
// address of the float that counts its steps, which is raised by one.
using AdamWRow =
    std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int, int, uintptr_t>;

void adamw_step_binding(const std::vector<AdamWRow>& rows, double lr, double beta1, double beta2,
                        double eps, double weight_decay, int threads) {
  std::vector<AdamWTensor> tensors;
  tensors.reserve(rows.size());
  for (const auto& [param, grad, exp_avg, exp_avg_sq, numel, param_dtype, grad_dtype, count] :
       rows) {
    const double step = *pointer<float>(count) += 1;
    tensors.push_back({pointer(param), pointer(grad), pointer<float>(exp_avg),
                       pointer<float>(exp_avg_sq), numel, param_dtype, grad_dtype,
                       float(lr / (1 - std::pow(beta1, step))),
                       float(1 / std::sqrt(1 - std::pow(beta2, step)))});
  }
  const AdamWScalars scalars{float(1 - beta1), float(1 - beta2), float(eps),
                             float(lr * weight_decay)};
  adamw_step(tensors, scalars, threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.attr("__doc__") = "gradsmith's C++ kernels; called by the cpu backend of each op.";

  m.def("isa_levels", isa_levels, "Instruction set levels that this machine runs, best last.");
  m.def("isa", [] { return std::string(kIsaNames[int(current_isa())]); }, "The level in use.");
  m.def("set_isa", set_isa, py::arg("name"), "Use a lower level (for tests).");
  m.def("parallel_runtime", parallel_runtime, "Where the threads come from.");

  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("rms_norm_forward", rms_norm_forward_binding, no_gil);
  m.def("rms_norm_backward", rms_norm_backward_binding, no_gil);
  m.def("rms_norm_block_rows", rms_norm_block_rows, "Rows in a block of dweight's partial sums.");
  m.def("adamw_step", adamw_step_binding, no_gil);
}
