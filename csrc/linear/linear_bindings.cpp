#include "common/bindings.h"
#include "linear/linear_cpu.h"

namespace {

void product(uintptr_t a, int64_t a_stride, bool a_transposed, uintptr_t b, int64_t b_stride,
             bool b_transposed, uintptr_t bias, uintptr_t c, int64_t rows, int64_t columns,
             int64_t depth, int dtype, int threads) {
  const LinearProduct p{pointer(a), pointer(b), pointer(bias), pointer(c),   a_stride,    b_stride,
                        rows,       columns,    depth,         a_transposed, b_transposed};
  linear_product(p, dtype, threads);
}

}  // namespace

BINDINGS(linear) {
  m.def("linear_product", product, NoGil());
}
