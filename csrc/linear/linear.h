// The products of a linear layer in bfloat16: its output, its input's and its weight's gradient.
//
//   c [rows, columns] = a b + bias,  summed over `depth` in float32, rounded once
//
// Each operand is read as it lies in memory or turned. The packed b stands in pieces of kDepth
// words of its depth and panels of kPanel columns: [pieces][panels][words][kPanel]. A task is a
// block of rows: it packs them piece by piece and goes through the panels while they stay in the L2
// cache.
#pragma once

#include <stdint.h>

struct LinearProduct {
  const void* a;  // [rows, depth], or [depth, rows] if a_turned; `a_stride` elements between rows
  const void* b;  // [depth, columns], or [columns, depth] if b_turned
  const void* bias;  // [columns] or null
  void* c;           // contiguous
  int64_t a_stride, b_stride, rows, columns, depth;
  bool a_turned, b_turned;

  // Words: an odd number of cache lines, so that a tile's rows do not meet in one set of the L1.
  static constexpr int64_t kDepth = 784;
  static constexpr int64_t kPanel = 64;    // columns
  static constexpr int64_t kRows = 192;    // of a task, at most
  static constexpr int64_t kGroup = 1024;  // columns whose sums are kept while the depth goes on
};

// Bytes of the packed b, and of a thread's packed rows and sums.
struct LinearSizes {
  int64_t packed, rows, sums;
};

struct LinearKernels {
  LinearSizes (*sizes)(const LinearProduct&);
  void (*pack)(const LinearProduct&, int64_t panel, void* packed);
  // Rows [begin, end), at most kRows.
  void (*multiply)(const LinearProduct&, int64_t begin, int64_t end, const void* packed,
                   void* packed_rows, float* sums);
};

extern const LinearKernels linear_portable, linear_avx2, linear_avx512, linear_avx512bf16,
    linear_amx;
