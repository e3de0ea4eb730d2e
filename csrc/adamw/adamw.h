// One AdamW step over many tensors: each element's parameter, gradient and both moments are read
// once and written once.
#pragma once

#include <stdint.h>

struct AdamWTensor {
  void* param;       // dtype param_dtype
  const void* grad;  // dtype grad_dtype
  float* exp_avg;
  float* exp_avg_sq;
  int64_t numel;
  int param_dtype, grad_dtype;
  float step_size;            // lr / (1 - beta1^step)
  float inverse_correction;   // 1 / sqrt(1 - beta2^step)
};

struct AdamWScalars {
  float one_minus_beta1, one_minus_beta2, eps, decay;  // decay = lr * weight_decay
};

struct AdamWKernels {
  // Elements [begin, end) of one tensor.
  void (*step)(const AdamWTensor&, const AdamWScalars&, int64_t begin, int64_t end);
};

extern const AdamWKernels adamw_portable, adamw_avx2, adamw_avx512, adamw_avx512bf16;
