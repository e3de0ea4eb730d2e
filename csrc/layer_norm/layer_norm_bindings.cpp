#include "common/bindings.h"
#include "common/column_sums.h"
#include "layer_norm/layer_norm_cpu.h"

namespace {

void forward(uintptr_t x, int64_t x_stride, uintptr_t residual,
                                int64_t residual_stride, uintptr_t weight, uintptr_t bias,
                                uintptr_t y, uintptr_t h, uintptr_t statistics, int64_t rows,
                                int64_t cols, double eps, int x_dtype, int weight_dtype,
                                int bias_dtype, int threads) {
  const LayerNormForward a{pointer(x),
                           pointer(residual),
                           pointer(weight),
                           pointer(bias),
                           pointer(y),
                           pointer(h),
                           pointer<float>(statistics),
                           x_stride,
                           residual_stride,
                           cols,
                           eps,
                           weight_dtype,
                           bias_dtype};
  layer_norm_forward(a, rows, x_dtype, threads);
}

void backward(uintptr_t dy, int64_t dy_stride, uintptr_t dh, int64_t dh_stride,
                                 uintptr_t h, int64_t h_stride, uintptr_t weight,
                                 uintptr_t statistics, uintptr_t dx, uintptr_t partial_weight,
                                 uintptr_t partial_bias, uintptr_t dweight, uintptr_t dbias,
                                 int64_t rows, int64_t cols, int x_dtype, int weight_dtype,
                                 int bias_dtype, int threads) {
  const LayerNormBackward a{pointer(dy),
                            pointer(dh),
                            pointer(h),
                            pointer(weight),
                            pointer<float>(statistics),
                            pointer(dx),
                            pointer<float>(partial_weight),
                            pointer<float>(partial_bias),
                            pointer(dweight),
                            pointer(dbias),
                            dy_stride,
                            dh_stride,
                            h_stride,
                            rows,
                            cols,
                            weight_dtype,
                            bias_dtype};
  layer_norm_backward(a, x_dtype, threads);
}

}  // namespace

BINDINGS(layer_norm) {
  m.def("layer_norm_forward", forward, NoGil());
  m.def("layer_norm_backward", backward, NoGil());
  m.def("block_count", block_count, "Blocks of rows in the partial sums of a norm's gradients.");
}
