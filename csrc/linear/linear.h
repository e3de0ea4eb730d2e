// The products of a linear layer in 16 bits: its output, its input's and its weight's gradient.
//
//   c [rows, columns] = a b + bias,  summed over `depth` in float32, rounded once
//
// Each operand is read as it lies in memory or turned. The packed b stands in pieces of its depth
// and panels of columns: [pieces][panels][words][columns of a panel]. A task is a block of rows: it
// packs them piece by piece and goes through the panels while they stay in the L2 cache. How long a
// piece and how wide a panel is depends on the engine (common/matrix.h).
#pragma once

#include <stdint.h>

struct LinearProduct {
  const void* a;  // [rows, depth], or transposed; rows are a_stride elements apart
  const void* b;  // [depth, columns], or transposed
  const void* bias;  // [columns] or null
  void* c;           // contiguous
  int64_t a_stride, b_stride, rows, columns, depth;
  bool a_transposed, b_transposed;

  static constexpr int64_t kPacked = 64;   // columns that are packed at a time
  static constexpr int64_t kRows = 192;    // of a task, at most
  static constexpr int64_t kGroup = 1024;  // columns whose sums are kept while the depth goes on
};

// Bytes of the packed b, and of a thread's packed rows and sums; a task's columns, of kGroup.
struct LinearSizes {
  int64_t packed, rows, sums, columns;
};

struct LinearKernels {
  LinearSizes (*sizes)(const LinearProduct&);
  // Columns from `column`, a multiple of kPacked, at most kPacked of them.
  void (*pack)(const LinearProduct&, int64_t column, void* packed);
  // Rows [begin, end), at most kRows, and `columns` columns from `column` on.
  void (*multiply)(const LinearProduct&, int64_t begin, int64_t end, int64_t column,
                   int64_t columns, const void* packed, void* packed_rows, float* sums);
};

// For bfloat16 and float16, per instruction set. float32 stays with torch (docs/log.md, "Linear").
extern const LinearKernels linear_portable[2], linear_avx2[2], linear_avx512[2],
    linear_avx512bf16[2], linear_amx[2];
