// The plan of an optimizer's step over many tensors.
#pragma once

#include <algorithm>
#include <vector>

#include "common/tensor_lists.h"

// What stays the same from one step to the next, kept so that thousands of small tensors do not
// cost thousands of Python calls a step.
template <class Tensor>
class Plan {
 public:
  // Gradients that lie contiguous in memory and have the sizes that the plan was made for.
  void set_grads(const pybind11::list& grads) {
    check(grads.size());
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const ContiguousView grad = contiguous_view(PyList_GET_ITEM(grads.ptr(), Py_ssize_t(i)));
      if (grad.numel != numels_[i]) throw pybind11::value_error("Plan: a gradient of another size");
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
    if (count != tensors_.size()) throw pybind11::value_error("Plan: not as many as tensors");
  }
  std::vector<Tensor> tensors_;
  std::vector<int64_t> numels_;
  std::vector<float*> steps_;
  std::vector<int> places_;
};
