#include "glu/glu_cpu.h"

#include "common/cpu.h"
#include "common/parallel.h"

namespace {

const GluKernels& kernels() { return PICK_TABLE(glu); }

constexpr int64_t size_of(int dtype) { return dtype == 0 ? 4 : 2; }

}  // namespace

void glu_forward(const GluForward& a, int activation, int dtype, int threads) {
  const auto& table = kernels();
  parallel_for(threads, a.rows * glu_blocks_of_row(a.cols), 3 * a.rows * a.cols * size_of(dtype),
               [&](int64_t begin, int64_t end) {
                 table.forward(a, activation, dtype, begin, end);
               });
}

void glu_backward(const GluBackward& a, int activation, int dtype, int threads) {
  const auto& table = kernels();
  parallel_for(threads, a.rows * glu_blocks_of_row(a.cols), 5 * a.rows * a.cols * size_of(dtype),
               [&](int64_t begin, int64_t end) {
                 table.backward(a, activation, dtype, begin, end);
               });
}
