// Cuts a product into tasks for the threads. Every sum's order follows from the depth alone.
#include "linear/linear_cpu.h"

#include <algorithm>

#include "common/cpu.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "common/workspace.h"

namespace {

const LinearKernels& kernels(int dtype) { return PICK_TABLE_WITH_AMX(linear)[dtype - kBFloat16]; }

}  // namespace

void linear_product(const LinearProduct& p, int dtype, int threads) {
  const auto& table = kernels(dtype);
  const auto sizes = table.sizes(p);
  constexpr int64_t packed_columns = LinearProduct::kPacked;
  // Blocks of equal length, some for each thread, so that the threads end together.
  const int64_t share = p.rows / (4 * int64_t(threads)) / 32 * 32;
  const int64_t block = std::clamp<int64_t>(share, 32, LinearProduct::kRows);

  Workspace memory;
  const auto packed = memory.plan(sizes.packed);
  const auto rows = memory.plan(threads * sizes.rows), sums = memory.plan(threads * sizes.sums);
  memory.take();
  parallel_tasks(
      threads, (p.columns + packed_columns - 1) / packed_columns,
      [&](int64_t task, int) { table.pack(p, task * packed_columns, memory[packed]); });
  const int64_t blocks = (p.rows + block - 1) / block;
  const int64_t groups = (p.columns + sizes.columns - 1) / sizes.columns;
  parallel_tasks(threads, groups * blocks, [&](int64_t task, int thread) {
    const int64_t row = task % blocks * block, column = task / blocks * sizes.columns;
    table.multiply(p, row, std::min(row + block, p.rows), column, sizes.columns, memory[packed],
                   memory[rows] + thread * sizes.rows,
                   reinterpret_cast<float*>(memory[sums] + thread * sizes.sums));
  });
}
