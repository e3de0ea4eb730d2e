// What the bindings call: LayerNorm on the CPU, on the instruction set and the threads at hand.
#pragma once

#include "layer_norm/layer_norm.h"

void layer_norm_forward(const LayerNormForward&, int64_t rows, int x_dtype, int threads);
void layer_norm_backward(const LayerNormBackward&, int x_dtype, int threads);
