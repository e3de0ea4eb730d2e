#include "common/tensor_lists.h"

#include <algorithm>
#include <vector>

#include "common/bindings.h"

namespace {

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
    return all = read_tensor(tensor, t) && contiguous(t);
  });
  return all;
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
      if (read_tensor(object, t)) {
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

}  // namespace

bool read_tensor(PyObject* object, DLTensor& out) {
  static const Torch* const torch = new Torch;  // never destroyed: Python may be gone by then
  if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(torch->tensor_type.ptr())))
    return false;
  if (torch->table->view(object, &out) == 0) return true;
  PyErr_Clear();
  return false;
}

ContiguousView contiguous_view(PyObject* object) {
  DLTensor t;
  if (!read_tensor(object, t) || !contiguous(t))
    throw py::value_error("a tensor is not contiguous");
  int64_t numel = 1;
  for (int32_t i = 0; i < t.ndim; ++i) numel *= t.shape[i];
  if (t.type_code == kDLFloat && t.type_bits == 32) return {t.data, numel, kFloat32};
  if (t.type_code == kDLBFloat && t.type_bits == 16) return {t.data, numel, kBFloat16};
  if (t.type_code == kDLFloat && t.type_bits == 16) return {t.data, numel, kFloat16};
  throw py::type_error("a tensor is not of float32, bfloat16 or float16");
}

BINDINGS(tensor_lists) {
  py::class_<Layouts>(m, "Layouts", "What tensors looked like, and where they were.")
      .def(py::init<const py::list&>())
      .def("alike", &Layouts::alike)
      .def("same", &Layouts::same);
  m.def("all_contiguous", all_contiguous);
}
