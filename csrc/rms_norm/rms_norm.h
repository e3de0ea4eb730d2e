// RMSNorm over rows of x, with h = x (+ residual):  y = h * rstd * (offset + weight),
// rstd = 1 / sqrt(mean(h^2) + eps).
#pragma once

#include <stdint.h>

struct RmsNormForward {
  const void* x;         // [rows, cols], row stride x_stride (elements), dtype x
  const void* residual;  // like x with residual_stride, or null
  const void* weight;    // [cols], dtype weight
  void* y;               // [rows, cols] contiguous, dtype x
  void* h;               // [rows, cols] contiguous, dtype x; null without residual
  float* rstd;           // [rows]
  int64_t x_stride, residual_stride, cols;
  double eps;
  float offset;
};

struct RmsNormBackward {
  const void* dy;      // [rows, cols], row stride dy_stride, dtype x
  const void* dh;      // gradient that reaches h from elsewhere, row stride dh_stride; or null
  const void* h;       // what was normalised, row stride h_stride
  const void* weight;  // [cols], dtype weight
  const float* rstd;   // [rows]
  void* dx;            // [rows, cols] contiguous, dtype x
  float* partial;      // [block_count(rows), cols]: dweight of each block of rows; or null
  void* dweight;       // [cols], dtype weight
  int64_t dy_stride, dh_stride, h_stride, rows, cols;
  float offset;
};

struct RmsNormKernels {
  void (*forward)(const RmsNormForward&, int x_dtype, int weight_dtype, int64_t begin, int64_t end);
  // Blocks of rows [begin, end): dx and partial.
  void (*backward)(const RmsNormBackward&, int x_dtype, int weight_dtype, int64_t begin,
                   int64_t end);
  // Columns [begin, end) of dweight from partial.
  void (*dweight)(const RmsNormBackward&, int weight_dtype, int64_t begin, int64_t end);
};

extern const RmsNormKernels rms_norm_portable, rms_norm_avx2, rms_norm_avx512, rms_norm_avx512bf16;
