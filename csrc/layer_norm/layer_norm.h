// LayerNorm over rows of x, with h = x (+ residual):  y = (h - mean) * rstd * weight + bias,
// rstd = 1 / sqrt(mean((h - mean)^2) + eps). The mean is kept in two parts, itself and what its
// rounding left: h - mean then loses nothing where the mean is large beside the deviation.
#pragma once

#include <stdint.h>

struct LayerNormForward {
  const void* x;         // [rows, cols], row stride x_stride (elements), dtype x
  const void* residual;  // like x with residual_stride, or null
  const void* weight;    // [cols], dtype weight; null is 1
  const void* bias;      // [cols], dtype bias; null is 0
  void* y;               // [rows, cols] contiguous, dtype x
  void* h;               // [rows, cols] contiguous, dtype x; null without residual
  float* statistics;     // [rows, 3]: mean, what its rounding left, rstd
  int64_t x_stride, residual_stride, cols;
  double eps;
  int weight_dtype, bias_dtype;
};

// Null is what is not needed: dx, or a sum and its partial sums.
struct LayerNormBackward {
  const void* dy;           // [rows, cols], row stride dy_stride, dtype x
  const void* dh;           // gradient that reaches h from elsewhere, row stride dh_stride; or null
  const void* h;            // what was normalised, row stride h_stride
  const void* weight;       // [cols], dtype weight; null is 1
  const float* statistics;  // [rows, 3]
  void* dx;                 // [rows, cols] contiguous, dtype x
  float* partial_weight;    // [block_count(rows), cols]: dweight of each block of rows
  float* partial_bias;      // likewise
  void* dweight;            // [cols], dtype weight
  void* dbias;              // [cols], dtype bias
  int64_t dy_stride, dh_stride, h_stride, rows, cols;
  int weight_dtype, bias_dtype;
};

struct LayerNormKernels {
  void (*forward)(const LayerNormForward&, int x_dtype, int64_t begin, int64_t end);
  // Blocks of rows [begin, end): dx and the partial sums.
  void (*backward)(const LayerNormBackward&, int x_dtype, int64_t begin, int64_t end);
  // Columns [begin, end) of dweight and dbias.
  void (*sums)(const LayerNormBackward&, int64_t begin, int64_t end);
};

extern const LayerNormKernels layer_norm_portable, layer_norm_avx2, layer_norm_avx512,
    layer_norm_avx512bf16;
