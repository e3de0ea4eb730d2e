#include "rope/rope_cpu.h"

#include "common/cpu.h"
#include "common/parallel.h"

namespace {

const RopeKernels& kernels() { return PICK_TABLE(rope); }

}  // namespace

void rope(const Rope& a, int64_t batch, int dtype, int threads) {
  const auto& table = kernels();
  const int64_t rows = batch * a.length;
  int64_t heads = 0;
  for (int t = 0; t < a.count; ++t) heads += a.tensors[t].heads;
  const int64_t bytes = 2 * rows * heads * a.size * (dtype == 0 ? 4 : 2);
  parallel_for(threads, rows, bytes, [&](int64_t begin, int64_t end) {
    table.rotate(a, dtype, begin, end);
  });
}
