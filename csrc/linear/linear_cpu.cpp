// Cuts a product into tasks for the threads. Every sum's order follows from the depth alone.
#include "linear/linear_cpu.h"

#include <algorithm>

#include "common/cpu.h"
#include "common/parallel.h"
#include "common/workspace.h"

namespace {

const LinearKernels& kernels() {
#if defined(__x86_64__)
  return pick(linear_portable, linear_avx2, linear_avx512, linear_avx512bf16, linear_amx);
#else
  return linear_portable;
#endif
}

}  // namespace

void linear_product(const LinearProduct& p, int threads) {
  const auto& table = kernels();
  const auto sizes = table.sizes(p);
  const int64_t panels = (p.columns + LinearProduct::kPanel - 1) / LinearProduct::kPanel;
  // Blocks of equal length, some for each thread, so that the threads end together.
  const int64_t share = p.rows / (4 * int64_t(threads)) / 32 * 32;
  const int64_t block = std::clamp<int64_t>(share, 32, LinearProduct::kRows);

  Workspace memory;
  const auto packed = memory.plan(sizes.packed);
  const auto rows = memory.plan(threads * sizes.rows), sums = memory.plan(threads * sizes.sums);
  memory.take();
  parallel_tasks(threads, panels,
                 [&](int64_t panel, int) { table.pack(p, panel, memory[packed]); });
  parallel_tasks(threads, (p.rows + block - 1) / block, [&](int64_t task, int thread) {
    table.multiply(p, task * block, std::min((task + 1) * block, p.rows), memory[packed],
                   memory[rows] + thread * sizes.rows,
                   reinterpret_cast<float*>(memory[sums] + thread * sizes.sums));
  });
}
