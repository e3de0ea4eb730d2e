// Lists of torch's tensors, read without a call of Python for each: through DLPack's table
// (common/dlpack.h), for optimizers, whose steps have thousands of small ones.
#pragma once

#include <pybind11/pybind11.h>
#include <string.h>

#include "common/dlpack.h"
#include "common/dtype.h"

// False if the object is no tensor or has no memory of its own.
bool read_tensor(PyObject* object, DLTensor& out);

// Contiguous memory and its dtype code.
struct ContiguousView {
  void* data;
  int64_t numel;
  int dtype;
};

// Raises ValueError where a tensor is not contiguous, TypeError where its dtype is not a kernel's.
ContiguousView contiguous_view(PyObject* object);

// f(object) for each of a list, until it is false. Between two steps thousands of tensors have left
// the cache, so those that come next are asked for: the object, and what its first words point to,
// which is where torch keeps a tensor. Were it elsewhere, nothing but time would be lost.
template <class F>
void each_object(const pybind11::list& list, F&& f) {
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
