#include "layer_norm/layer_norm_cpu.h"

#include "common/column_sums.h"
#include "common/cpu.h"
#include "common/parallel.h"

namespace {

const LayerNormKernels& kernels() { return PICK_TABLE(layer_norm); }

constexpr int64_t size_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

}  // namespace

void layer_norm_forward(const LayerNormForward& a, int64_t rows, int x_dtype, int threads) {
  const auto& table = kernels();
  const int64_t arrays = a.residual ? 4 : 2;
  parallel_for(
      threads, rows, arrays * rows * a.cols * size_of(x_dtype),
      [&](int64_t begin, int64_t end) { table.forward(a, x_dtype, begin, end); });
}

void layer_norm_backward(const LayerNormBackward& a, int x_dtype, int threads) {
  const auto& table = kernels();
  const int64_t blocks = block_count(a.rows), sums = !!a.partial_weight + !!a.partial_bias;
  const int64_t arrays = 2 + !!a.dx + !!a.dh;
  parallel_for(
      threads, blocks, arrays * a.rows * a.cols * size_of(x_dtype),
      [&](int64_t begin, int64_t end) { table.backward(a, x_dtype, begin, end); });
  if (sums)
    parallel_for(threads, a.cols, sums * blocks * a.cols * 4,
                 [&](int64_t begin, int64_t end) { table.sums(a, begin, end); });
}
