// Gated linear units over rows:  y = activation(gate) * up,
// dgate = dy * up * activation'(gate),  dup = dy * activation(gate).
#pragma once

#include <stdint.h>

// The order of ACTIVATIONS in gradsmith_kernels/ops/glu/op.py.
enum Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

struct GluForward {
  const void *gate, *up;  // [rows, cols], with row strides (elements)
  void* y;                // [rows, cols] contiguous
  int64_t gate_stride, up_stride, rows, cols;
};

struct GluBackward {
  const void *dy, *gate, *up;  // [rows, cols], with row strides
  void *dgate, *dup;           // [rows, cols] contiguous; null if not needed
  int64_t dy_stride, gate_stride, up_stride, rows, cols;
};

// Rows are cut into blocks, which the threads share.
constexpr int64_t kGluBlock = 4096;
inline int64_t glu_blocks_of_row(int64_t cols) { return (cols + kGluBlock - 1) / kGluBlock; }

struct GluKernels {
  // Blocks [begin, end), counted row by row.
  void (*forward)(const GluForward&, int activation, int dtype, int64_t begin, int64_t end);
  void (*backward)(const GluBackward&, int activation, int dtype, int64_t begin, int64_t end);
};

extern const GluKernels glu_portable, glu_avx2, glu_avx512, glu_avx512bf16;
