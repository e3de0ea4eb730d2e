// What the bindings call: linear cross-entropy on the CPU.
#pragma once

#include "linear_cross_entropy/linear_cross_entropy.h"

// Loss, lse and gradients, whatever of them `a` asks for.
void linear_cross_entropy(const LinearCrossEntropy& a, int dtype, int threads);

// y [rows, cols], contiguous, = factor * x, whose rows are `stride` floats apart.
void scale_rows(const float* x, int64_t stride, int64_t rows, int64_t cols, float factor, void* y,
                int dtype, int threads);
