#include "common/bindings.h"
#include "linear_cross_entropy/linear_cross_entropy_cpu.h"

namespace {

void losses(uintptr_t hidden, int64_t hidden_stride, uintptr_t weight, int64_t weight_stride,
            uintptr_t bias, uintptr_t target, int64_t rows, int64_t vocabulary, int64_t size,
            int64_t chunk, double label_smoothing, double z_loss, double softcap, uintptr_t loss,
            uintptr_t lse, uintptr_t upstream, uintptr_t dhidden, uintptr_t dweight,
            uintptr_t dbias, int dtype, int threads) {
  const LinearCrossEntropy a{pointer(hidden),
                             pointer(weight),
                             pointer(bias),
                             pointer<int64_t>(target),
                             hidden_stride,
                             weight_stride,
                             rows,
                             vocabulary,
                             size,
                             chunk,
                             label_smoothing,
                             z_loss,
                             float(softcap),
                             pointer<double>(loss),
                             pointer<double>(lse),
                             pointer<float>(upstream),
                             pointer<float>(dhidden),
                             pointer<float>(dweight),
                             pointer<float>(dbias)};
  linear_cross_entropy(a, dtype, threads);
}

void scale_rows_of(uintptr_t x, int64_t stride, int64_t rows, int64_t cols, float factor,
                        uintptr_t y, int dtype, int threads) {
  scale_rows(pointer<float>(x), stride, rows, cols, factor, pointer(y), dtype, threads);
}

}  // namespace

BINDINGS(linear_cross_entropy) {
  m.def("linear_cross_entropy", losses, NoGil());
  m.def("scale_rows", scale_rows_of, NoGil());
}
