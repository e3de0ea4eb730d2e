#include "rms_norm/rms_norm_cpu.h"

#include "common/column_sums.h"
#include "common/cpu.h"
#include "common/parallel.h"

namespace {

const RmsNormKernels& kernels() { return PICK_TABLE(rms_norm); }

constexpr int64_t size_of(int dtype) { return dtype == 0 ? 4 : 2; }

}  // namespace

void rms_norm_forward(const RmsNormForward& a, int64_t rows, int x_dtype, int weight_dtype,
                      int threads) {
  const auto& table = kernels();
  const int64_t arrays = a.residual ? 4 : 2;
  parallel_for(threads, rows, arrays * rows * a.cols * size_of(x_dtype),
               [&](int64_t begin, int64_t end) {
                 table.forward(a, x_dtype, weight_dtype, begin, end);
               });
}

void rms_norm_backward(const RmsNormBackward& a, int x_dtype, int weight_dtype, int threads) {
  const auto& table = kernels();
  const int64_t blocks = block_count(a.rows);
  const int64_t arrays = a.dh ? 4 : 3;
  parallel_for(threads, blocks, arrays * a.rows * a.cols * size_of(x_dtype),
               [&](int64_t begin, int64_t end) {
                 table.backward(a, x_dtype, weight_dtype, begin, end);
               });
  if (a.partial)
    parallel_for(threads, a.cols, blocks * a.cols * 4, [&](int64_t begin, int64_t end) {
      table.dweight(a, weight_dtype, begin, end);
    });
}
