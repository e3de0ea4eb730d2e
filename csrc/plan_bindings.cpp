// What optimizers call: plans of steps that are taken again and again, and the watch over their
// tensors. Thousands of small tensors must not cost thousands of Python calls a step, so torch's
// tensors are read here, through DLPack's table (common/dlpack.h).
#include "plan_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "adafactor_step/adafactor_step_cpu.h"
#include "common/dlpack.h"
#include "common/dtype.h"
#include "optimizer_step/optimizer_step_cpu.h"

namespace py = pybind11;

namespace {

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// ---------------------------------------------------------------------------------- tensors

struct Torch {
  py::object tensor_type;
  const DLPackExchangeAPI* table;
  Torch() : tensor_type(py::module_::import("torch").attr("Tensor")) {
    const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
    table = static_cast<const DLPackExchangeAPI*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!table) throw py::error_already_set();
    if (table->major != 1) throw py::import_error("torch speaks another DLPack than version 1");
  }
};

// False if the object is no tensor or has no memory of its own.
bool read(PyObject* object, DLTensor& out) {
  static const Torch* const torch = new Torch;  // never destroyed: Python may be gone by then
  if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(torch->tensor_type.ptr())))
    return false;
  if (torch->table->view(object, &out) == 0) return true;
  PyErr_Clear();
  return false;
}

// f(object) for each of a list, until it is false. Between two steps thousands of tensors have left
// the cache, so those that come next are asked for: the object, and what its first words point to,
// which is where torch keeps a tensor. Were it elsewhere, nothing but time would be lost.
template <class F>
void each_object(const py::list& list, F&& f) {
  PyObject* const objects = list.ptr();
  const Py_ssize_t size = PyList_GET_SIZE(objects);
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (i + 24 < size) __builtin_prefetch(PyList_GET_ITEM(objects, i + 24));
    if (i + 12 < size) {
      PyObject* const next = PyList_GET_ITEM(objects, i + 12);
      const char* words[4] = {};
      if (Py_TYPE(next)->tp_basicsize >= Py_ssize_t(sizeof words))
        memcpy(words, next, sizeof words);
      for (int word = 2; word < 4; ++word)
        for (int line = 0; line < 4; ++line) __builtin_prefetch(words[word] + 64 * line);
    }
    if (!f(PyList_GET_ITEM(objects, i))) return;
  }
}

// Sizes, strides, dtypes and devices of tensors, and where they are, at one moment.
class Layouts {
 public:
  explicit Layouts(const py::list& objects) : objects_(objects) {
    each(objects, [&](const int64_t* words, size_t count) {
      words_.insert(words_.end(), words, words + count);
      return true;
    });
  }

  // Whether these are laid out as the ones at that moment were; wherever they are, or in the same
  // places. What is no tensor must be the same object.
  bool alike(const py::list& objects) const { return fits(objects, false); }
  bool same(const py::list& objects) const { return fits(objects, true); }

 private:
  // f(words, count) for each object: its address, then what describes it.
  template <class F>
  static void each(const py::list& objects, F&& f) {
    std::vector<int64_t> words;
    each_object(objects, [&](PyObject* object) {
      DLTensor t;
      if (read(object, t)) {
        const int64_t kind = int64_t(t.type_code) << 32 | t.type_bits << 16 | t.ndim;
        words.assign({int64_t(uintptr_t(t.data)), kind,
                      int64_t(t.device_type) << 32 | t.device_id});
        words.insert(words.end(), t.shape, t.shape + t.ndim);
        words.insert(words.end(), t.strides, t.strides + t.ndim);
      } else {
        words.assign({0, int64_t(uintptr_t(object)), -1});
      }
      return f(words.data(), words.size());
    });
  }

  bool fits(const py::list& objects, bool places) const {
    if (objects.size() != objects_.size()) return false;
    size_t at = 0;
    bool same = true;
    each(objects, [&](const int64_t* words, size_t count) {
      // A description says itself how long it is, so unequal ones differ before they end.
      const size_t skipped = places ? 0 : 1;
      same = at + count <= words_.size() &&
             std::equal(words + skipped, words + count, words_.begin() + int64_t(at + skipped));
      at += count;
      return same;
    });
    return same;
  }

  py::list objects_;  // kept alive, so that no other takes the place of one
  std::vector<int64_t> words_;
};

struct View {
  void* data;
  int64_t numel;
  int dtype;
};

bool contiguous(const DLTensor& t) {
  int64_t below = 1, numel = 1;
  for (int32_t i = 0; i < t.ndim; ++i) numel *= t.shape[i];
  if (numel == 0) return true;
  for (int32_t i = t.ndim - 1; i >= 0; below *= t.shape[i--])
    if (t.shape[i] != 1 && t.strides[i] != below) return false;
  return true;
}

bool all_contiguous(const py::list& tensors) {
  bool all = true;
  each_object(tensors, [&](PyObject* tensor) {
    DLTensor t;
    return all = read(tensor, t) && contiguous(t);
  });
  return all;
}

View contiguous_view(PyObject* object) {
  DLTensor t;
  if (!read(object, t) || !contiguous(t)) throw py::value_error("a tensor is not contiguous");
  int64_t numel = 1;
  for (int32_t i = 0; i < t.ndim; ++i) numel *= t.shape[i];
  if (t.type_code == kDLFloat && t.type_bits == 32) return {t.data, numel, kFloat32};
  if (t.type_code == kDLBFloat && t.type_bits == 16) return {t.data, numel, kBFloat16};
  if (t.type_code == kDLFloat && t.type_bits == 16) return {t.data, numel, kFloat16};
  throw py::type_error("a tensor is not of float32, bfloat16 or float16");
}

// ------------------------------------------------------------------------------------ plans

// param, state1, state2, state3, absmax1, absmax2, master, compensation, address of the float that
// counts its steps, numel, param dtype, state dtype, number of its stream of random bits.
using StepRow = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                           uintptr_t, uintptr_t, uintptr_t, int64_t, int, int, uint32_t>;

// What stays the same from one step to the next, kept so that thousands of small tensors do not
// cost thousands of Python calls a step.
template <class Tensor>
class Plan {
 public:
  // Gradients that lie contiguous in memory and have the sizes that the plan was made for.
  void set_grads(const py::list& grads) {
    check(grads.size());
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const View grad = contiguous_view(PyList_GET_ITEM(grads.ptr(), Py_ssize_t(i)));
      if (grad.numel != numels_[i]) throw py::value_error("Plan: a gradient of another size");
      tensors_[i].grad = grad.data;
      tensors_[i].grad_dtype = grad.dtype;
    }
  }

  // Raises the step counts by one and returns the distinct ones.
  std::vector<float> count() {
    std::vector<float> counts;
    places_.clear();
    for (float* step : steps_) {
      *step += 1;
      auto found = std::find(counts.begin(), counts.end(), *step);
      if (found == counts.end()) found = counts.insert(counts.end(), *step);
      places_.push_back(int(found - counts.begin()));
    }
    return counts;
  }

  // Each tensor's place among the distinct step counts.
  std::vector<int> places() const { return places_; }

 protected:
  void check(size_t count) const {
    if (count != tensors_.size()) throw py::value_error("Plan: not as many as tensors");
  }
  std::vector<Tensor> tensors_;
  std::vector<int64_t> numels_;
  std::vector<float*> steps_;
  std::vector<int> places_;
};

class StepPlan : public Plan<StepTensor> {
 public:
  explicit StepPlan(const std::vector<StepRow>& rows) {
    for (const auto& [param, state1, state2, state3, absmax1, absmax2, master, compensation, step,
                      numel, param_dtype, state_dtype, stream] : rows) {
      tensors_.push_back({pointer(param), nullptr, pointer(state1), pointer(state2),
                          pointer(state3), pointer<float>(absmax1), pointer<float>(absmax2),
                          pointer<float>(master), pointer<uint16_t>(compensation), numel,
                          param_dtype, 0, state_dtype, 0, {}});
      numels_.push_back(numel);
      steps_.push_back(pointer<float>(step));
      streams_.push_back(stream);
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

// param, row_var or variance, col_var or 0, master, compensation, address of the float that counts
// its steps; matrices, rows, columns; param dtype.
using FactorRow = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                             int64_t, int64_t, int64_t, int>;

class AdafactorPlan : public Plan<FactorTensor> {
 public:
  explicit AdafactorPlan(const std::vector<FactorRow>& rows) {
    for (const auto& [param, row_var, col_var, master, compensation, step, matrices, count, cols,
                      param_dtype] : rows) {
      FactorTensor t{};
      t.param = pointer(param);
      t.row_var = pointer<float>(row_var);
      t.col_var = pointer<float>(col_var);
      t.master = pointer<float>(master);
      t.compensation = pointer<uint16_t>(compensation);
      t.matrices = matrices;
      t.rows = count;
      t.cols = cols;
      t.param_dtype = param_dtype;
      tensors_.push_back(t);
      numels_.push_back(matrices * count * cols);
      steps_.push_back(pointer<float>(step));
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

std::pair<double, int64_t> squared_norm_binding(const py::list& grads, int threads) {
  std::vector<NormTensor> tensors;
  for (const py::handle grad : grads) {
    const View view = contiguous_view(grad.ptr());
    tensors.push_back({view.data, view.numel, view.dtype});
  }
  py::gil_scoped_release no_gil;
  return squared_norm(tensors, threads);
}

}  // namespace

void bind_plans(py::module_& m) {
  py::class_<Layouts>(m, "Layouts", "What tensors looked like, and where they were.")
      .def(py::init<const py::list&>())
      .def("alike", &Layouts::alike)
      .def("same", &Layouts::same);
  m.def("all_contiguous", all_contiguous);
  m.def("squared_norm", squared_norm_binding);
  py::class_<StepPlan>(m, "StepPlan", "Tensors that an optimizer steps together.")
      .def(py::init<const std::vector<StepRow>&>())
      .def("set_grads", &StepPlan::set_grads)
      .def("count", &StepPlan::count)
      .def("places", &StepPlan::places)
      .def("run", &StepPlan::run);
  py::class_<AdafactorPlan>(m, "AdafactorPlan", "Tensors that Adafactor steps together.")
      .def(py::init<const std::vector<FactorRow>&>())
      .def("set_grads", &AdafactorPlan::set_grads)
      .def("count", &AdafactorPlan::count)
      .def("run", &AdafactorPlan::run);
}
