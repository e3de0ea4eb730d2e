// What the bindings call: RMSNorm on the CPU, on the instruction set and the threads at hand.
#pragma once

#include "rms_norm/rms_norm.h"

void rms_norm_forward(const RmsNormForward&, int64_t rows, int x_dtype, int weight_dtype,
                      int threads);
void rms_norm_backward(const RmsNormBackward&, int x_dtype, int weight_dtype, int threads);
