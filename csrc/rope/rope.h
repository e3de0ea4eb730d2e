// Rotary position embedding. Of the first `rotated` elements of a head each pair (a, b) becomes
// (a * cos_a - b * sin_a, b * cos_b + a * sin_b); the others are copied.
#pragma once

#include <stdint.h>

struct RopeTensor {
  const void* x;                   // [batch, length, heads, size], elements of a head adjacent
  int64_t x_batch, x_row, x_head;  // its strides, in elements
  void* y;                         // like x, contiguous
  int64_t heads;
};

struct RopeTable {
  const void* data;    // [batch, length, rotated], elements of a row adjacent
  int64_t batch, row;  // its strides; batch 0 where all sequences share one
};

struct Rope {
  RopeTensor tensors[2];
  int count;  // of tensors
  RopeTable cos, sin;
  int64_t length, size, rotated;
  bool interleaved;  // a pair is x[2i], x[2i + 1]; else x[i], x[i + rotated / 2]
  bool transposed;   // by the transposed matrices: the gradient
  int table_dtype;   // of cos and sin
};

struct RopeKernels {
  // Rows [begin, end) of [batch * length], of every tensor.
  void (*rotate)(const Rope&, int dtype, int64_t begin, int64_t end);
};

extern const RopeKernels rope_portable, rope_avx2, rope_avx512, rope_avx512bf16;
