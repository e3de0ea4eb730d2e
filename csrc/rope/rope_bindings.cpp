#include <pybind11/stl.h>
#include <tuple>
#include <vector>

#include "common/bindings.h"
#include "rope/rope_cpu.h"

namespace {

// Address, and strides of batch, row and head.
using View = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
// Address, and strides of batch (0 where all sequences share one) and row.
using Table = std::tuple<uintptr_t, int64_t, int64_t>;

RopeTable table(const Table& t) {
  const auto& [address, batch, row] = t;
  return {pointer(address), batch, row};
}

// tensors, one or two: view, address of the result, heads.
void rotate(const std::vector<std::tuple<View, uintptr_t, int64_t>>& tensors, const Table& cos,
            const Table& sin, int64_t batch, int64_t length, int64_t size, int64_t rotated,
            bool interleaved, bool transposed, int dtype, int table_dtype, int threads) {
  Rope a{};
  for (const auto& [view, y, heads] : tensors) {
    const auto& [x, of_batch, of_row, of_head] = view;
    a.tensors[a.count++] = {pointer(x), of_batch, of_row, of_head, pointer(y), heads};
  }
  a.cos = table(cos);
  a.sin = table(sin);
  a.length = length;
  a.size = size;
  a.rotated = rotated;
  a.interleaved = interleaved;
  a.transposed = transposed;
  a.table_dtype = table_dtype;
  rope(a, batch, dtype, threads);
}

}  // namespace

BINDINGS(rope) {
  m.def("rope", rotate, NoGil());
}
