#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "adafactor_step/adafactor_step_cpu.h"
#include "common/bindings.h"
#include "common/plan.h"

namespace {

// One tensor of a plan, `matrices` of rows x cols, and the float that counts its steps. row_var is
// the variance of each element where there is no col_var.
struct FactorRow {
  FactorTensor tensor{};
  float* step;

  FactorRow(uintptr_t param, uintptr_t row_var, uintptr_t col_var, uintptr_t master,
            uintptr_t compensation, uintptr_t step_at, int64_t matrices, int64_t rows, int64_t cols,
            int param_dtype)
      : step(pointer<float>(step_at)) {
    tensor.param = pointer(param);
    tensor.row_var = pointer<float>(row_var);
    tensor.col_var = pointer<float>(col_var);
    tensor.master = pointer<float>(master);
    tensor.compensation = pointer<uint16_t>(compensation);
    tensor.matrices = matrices;
    tensor.rows = rows;
    tensor.cols = cols;
    tensor.param_dtype = param_dtype;
  }
};

class AdafactorPlan : public Plan<FactorTensor> {
 public:
  explicit AdafactorPlan(const std::vector<FactorRow>& rows) {
    for (const FactorRow& row : rows) {
      const FactorTensor& t = row.tensor;
      tensors_.push_back(t);
      numels_.push_back(t.matrices * t.rows * t.cols);
      steps_.push_back(row.step);
    }
  }


  // coefficients: a set of seven for each distinct step, in the order of FactorTensor.
  void run(const std::vector<std::array<double, 7>>& coefficients, float scale, bool zero_grad,
           int threads) {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      FactorTensor& t = tensors_[i];
      const auto& c = coefficients.at(size_t(places_[i]));
      std::tie(t.new_share, t.rate, t.eps1, t.eps2, t.clip, t.decay, t.threshold) =
          std::tuple_cat(c);
    }
    py::gil_scoped_release no_gil;
    adafactor_step(tensors_, {scale, zero_grad}, threads);
  }
};

}  // namespace

BINDINGS(adafactor_step) {
  using A = py::arg;
  py::class_<FactorRow>(m, "FactorRow", "One tensor of an AdafactorPlan: addresses (0: none).")
      .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t,
                    int64_t, int64_t, int>(),
           py::kw_only(), A("param"), A("row_var"), A("col_var"), A("master"), A("compensation"),
           A("step"), A("matrices"), A("rows"), A("cols"), A("param_dtype"));
  py::class_<AdafactorPlan>(m, "AdafactorPlan", "Tensors that Adafactor steps together.")
      .def(py::init<const std::vector<FactorRow>&>())
      .def("set_grads", &AdafactorPlan::set_grads)
      .def("count", &AdafactorPlan::count)
      .def("run", &AdafactorPlan::run);
}
