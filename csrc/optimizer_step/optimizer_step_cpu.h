// What the bindings call: a step on the CPU, on the instruction set and threads at hand.
#pragma once

#include <utility>
#include <vector>

#include "optimizer_step/optimizer_step.h"

// One sweep over all tensors. Their rows in `sums` (kLambNorms only; else empty) are set.
void optimizer_step(Rule rule, const std::vector<StepTensor>& tensors, const StepOptions& options,
                    std::vector<StepSums>& sums, int threads);

struct NormTensor {
  const void* values;
  int64_t numel;
  int dtype;
};

// The sum of all squares, in an order that follows from the shapes alone, and the index of the
// first tensor with a number that is not finite (else -1).
std::pair<double, int64_t> squared_norm(const std::vector<NormTensor>& tensors, int threads);
