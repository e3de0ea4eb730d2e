#include <pybind11/stl.h>

#include <array>
#include <utility>

#include "common/bindings.h"
#include "common/plan.h"
#include "optimizer_step/optimizer_step_cpu.h"

namespace {

// One tensor of a plan: where it and its states are, the float that counts its steps, and the
// number of its stream of random bits.
struct StepRow {
  StepTensor tensor;
  float* step;
  uint32_t stream;

  StepRow(uintptr_t param, uintptr_t state1, uintptr_t state2, uintptr_t state3, uintptr_t absmax1,
          uintptr_t absmax2, uintptr_t master, uintptr_t compensation, uintptr_t step_at,
          int64_t numel, int param_dtype, int state_dtype, uint32_t stream_number)
      : tensor{pointer(param),
               nullptr,
               pointer(state1),
               pointer(state2),
               pointer(state3),
               pointer<float>(absmax1),
               pointer<float>(absmax2),
               pointer<float>(master),
               pointer<uint16_t>(compensation),
               numel,
               param_dtype,
               0,
               state_dtype,
               0,
               {}},
        step(pointer<float>(step_at)),
        stream(stream_number) {}
};

class StepPlan : public Plan<StepTensor> {
 public:
  explicit StepPlan(const std::vector<StepRow>& rows) {
    for (const StepRow& row : rows) {
      tensors_.push_back(row.tensor);
      numels_.push_back(row.tensor.numel);
      steps_.push_back(row.step);
      streams_.push_back(row.stream);
    }
  }


  // coefficients: a set of eight with a seed for each distinct step, or for each tensor. Returns
  // the sums of squares of the weights and updates (Lamb's norms only).
  std::vector<std::pair<double, double>> run(
      int rule, const std::vector<std::pair<std::array<float, 8>, uint32_t>>& coefficients,
      bool for_each, float scale, bool zero_grad, bool stochastic, int threads) {
    if (for_each) check(coefficients.size());
    if (rule < 0 || rule >= kRules) throw py::value_error("StepPlan: no such rule");
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const auto& [values, seed] = coefficients.at(for_each ? i : size_t(places_[i]));
      std::copy(values.begin(), values.end(), tensors_[i].c);
      tensors_[i].key = (seed ^ (streams_[i] * 0x9e3779b9u)) * 0x85ebca6bu;
    }
    std::vector<StepSums> sums;
    {
      py::gil_scoped_release no_gil;
      optimizer_step(Rule(rule), tensors_, {scale, zero_grad, stochastic}, sums, threads);
    }
    std::vector<std::pair<double, double>> pairs;
    for (const auto& sum : sums) pairs.emplace_back(sum.weight, sum.update);
    return pairs;
  }

 private:
  std::vector<uint32_t> streams_;
};

std::pair<double, int64_t> squared_norm_of(const py::list& grads, int threads) {
  std::vector<NormTensor> tensors;
  for (const py::handle grad : grads) {
    const ContiguousView view = contiguous_view(grad.ptr());
    tensors.push_back({view.data, view.numel, view.dtype});
  }
  py::gil_scoped_release no_gil;
  return squared_norm(tensors, threads);
}

}  // namespace

BINDINGS(optimizer_step) {
  using A = py::arg;
  py::class_<StepRow>(m, "StepRow", "One tensor of a StepPlan: addresses (0: none).")
      .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                    uintptr_t, uintptr_t, int64_t, int, int, uint32_t>(),
           py::kw_only(), A("param"), A("state1"), A("state2"), A("state3"), A("absmax1"),
           A("absmax2"), A("master"), A("compensation"), A("step"), A("numel"), A("param_dtype"),
           A("state_dtype"), A("stream"));
  py::class_<StepPlan>(m, "StepPlan", "Tensors that an optimizer steps together.")
      .def(py::init<const std::vector<StepRow>&>())
      .def("set_grads", &StepPlan::set_grads)
      .def("count", &StepPlan::count)
      .def("places", &StepPlan::places)
      .def("run", &StepPlan::run);
  m.def("squared_norm", squared_norm_of);
}
