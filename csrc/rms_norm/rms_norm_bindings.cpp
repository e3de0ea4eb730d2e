#include "common/bindings.h"
#include "rms_norm/rms_norm_cpu.h"

namespace {

void forward(uintptr_t x, int64_t x_stride, uintptr_t residual,
                              int64_t residual_stride, uintptr_t weight, uintptr_t y, uintptr_t h,
                              uintptr_t rstd, int64_t rows, int64_t cols, double eps, double offset,
                              int x_dtype, int weight_dtype, int threads) {
  const RmsNormForward a{pointer(x), pointer(residual),    pointer(weight), pointer(y),
                         pointer(h), pointer<float>(rstd), x_stride,        residual_stride,
                         cols,       eps,                  float(offset)};
  rms_norm_forward(a, rows, x_dtype, weight_dtype, threads);
}

void backward(uintptr_t dy, int64_t dy_stride, uintptr_t dh, int64_t dh_stride,
                               uintptr_t h, int64_t h_stride, uintptr_t weight, uintptr_t rstd,
                               uintptr_t dx, uintptr_t partial, uintptr_t dweight, int64_t rows,
                               int64_t cols, double offset, int x_dtype, int weight_dtype,
                               int threads) {
  const RmsNormBackward a{pointer(dy),
                          pointer(dh),
                          pointer(h),
                          pointer(weight),
                          pointer<float>(rstd),
                          pointer(dx),
                          pointer<float>(partial),
                          pointer(dweight),
                          dy_stride,
                          dh_stride,
                          h_stride,
                          rows,
                          cols,
                          float(offset)};
  rms_norm_backward(a, x_dtype, weight_dtype, threads);
}

}  // namespace

BINDINGS(rms_norm) {
  m.def("rms_norm_forward", forward, NoGil());
  m.def("rms_norm_backward", backward, NoGil());
}
