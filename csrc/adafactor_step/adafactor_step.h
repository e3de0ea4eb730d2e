// One Adafactor step over many tensors. The formulas:
// gradsmith_kernels/ops/adafactor_step/__init__.py.
//
// The factors of the second moment are means of whole rows and columns, and the update is scaled to
// the root of its mean square, so a matrix is passed over three times:
//
//   sums     reads g: sums of squares by rows and by columns; then the factors are moved (`reduce`)
//   squares  reads g and x: sums of squares of the update and of the weights
//   apply    reads g and x, writes x and zeroes g
//
// A tensor of fewer than two dimensions has no factors: `squares` moves its variance too.
#pragma once

#include <stdint.h>

struct FactorTensor {
  void* param;             // dtype param_dtype; only written where there is a master
  void* grad;              // dtype grad_dtype
  float* row_var;          // [matrices, rows]; the variance where col_var is null
  float* col_var;          // [matrices, cols], or null
  float* master;           // float32 weights behind a 16-bit param, or null
  uint16_t* compensation;  // bfloat16: what rounding took from a 16-bit param, or null
  int64_t matrices, rows, cols;  // without factors: 1, 1, numel
  int param_dtype, grad_dtype;

  // Of this step:
  double new_share;   // of the new squares in the second moment
  double rate;        // relative step size, before it is multiplied by the weights' size
  double eps1, eps2;  // least root of the second moment, least size of the weights
  double clip;        // d: largest root mean square of the update
  float decay, threshold;  // learning rate times decoupled decay, and times l1
};

struct FactorOptions {
  float scale;  // of the gradient
  bool zero_grad;
};

// A matrix, or a stretch of one.
struct FactorBlock {
  int64_t matrix, row_begin, row_end, col_begin, col_end;
};

struct FactorSquares {
  double update, weight;
};

constexpr int64_t kFactorCols = 4096;  // a block has at most so many columns

struct AdafactorKernels {
  // Sums of squares of a block: of row i at rows[i * stride], of its columns at cols[0], ...
  void (*sums)(const FactorTensor&, const FactorOptions&, const FactorBlock&, double* rows,
               int64_t stride, double* cols);
  // Moves a stretch of factors to sum[j] / count; then to[j] = numerator / sqrt(factor).
  void (*move)(float* factors, const double* sums, int64_t size, double count, double new_share);
  void (*inverse_roots)(const float* factors, int64_t size, double numerator, float* to);
  // Sums of squares of a block. `rows` and `cols` are the inverse roots of the block's factors.
  FactorSquares (*squares)(const FactorTensor&, const FactorOptions&, const FactorBlock&,
                           const float* rows, const float* cols);
  // x -= decay * x + step * update, and what follows from it.
  void (*apply)(const FactorTensor&, const FactorOptions&, const FactorBlock&, const float* rows,
                const float* cols, float step);
};

extern const AdafactorKernels adafactor_portable, adafactor_avx2, adafactor_avx512,
    adafactor_avx512bf16;
