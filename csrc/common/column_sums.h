// Sums over rows, one for each column: the gradients of what a norm scales and shifts with. They
// are added up over blocks of rows, and then over the blocks, in an order that follows from the
// shape alone: the same bits for any number of threads. In an anonymous namespace for the reason
// given in common/dtype.h.
#pragma once

#include "common/elements.h"

namespace {

// Rows in a block. At most 256 blocks keep the partial sums a few per cent of the traffic; at least
// 32 rows in each, for the same reason.
inline int64_t block_rows(int64_t rows) {
  const int64_t spread = (rows + 255) / 256;
  return spread < 32 ? 32 : spread;
}

inline int64_t block_count(int64_t rows) {
  const int64_t size = block_rows(rows);
  return (rows + size - 1) / size;
}

// Columns [begin, end) of `out` from partial [blocks, cols].
inline void sum_blocks(const float* partial, int64_t blocks, int64_t cols, void* out, int dtype,
                       int64_t begin, int64_t end) {
  each_vector(end - begin, [&](int64_t at, int64_t n) ALWAYS_INLINE {
    const int64_t j = begin + at;
    Vec s[4] = {};
    for (int64_t block = 0; block < blocks; ++block)
      s[block % 4] += load<F32>(partial + block * cols + j, n);
    store_any(out, dtype, j, (s[0] + s[1]) + (s[2] + s[3]), n);
  });
}

}  // namespace
