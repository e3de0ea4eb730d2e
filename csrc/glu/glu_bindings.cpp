#include <pybind11/stl.h>

#include "common/bindings.h"
#include "glu/glu_cpu.h"

namespace {

// gate, up and dy: address and row stride. gradients: of gate and up, 0 for one that is not needed.
using Rows = std::pair<uintptr_t, int64_t>;

void forward(const Rows& gate, const Rows& up, uintptr_t y, int64_t rows, int64_t cols,
                         int activation, int dtype, int threads) {
  const GluForward a{pointer(gate.first), pointer(up.first), pointer(y), gate.second,
                     up.second,           rows,              cols};
  glu_forward(a, activation, dtype, threads);
}

void backward(const Rows& dy, const Rows& gate, const Rows& up,
                          const std::pair<uintptr_t, uintptr_t>& gradients, int64_t rows,
                          int64_t cols, int activation, int dtype, int threads) {
  const GluBackward a{pointer(dy.first),         pointer(gate.first),       pointer(up.first),
                      pointer(gradients.first),  pointer(gradients.second), dy.second,
                      gate.second,               up.second,                 rows,
                      cols};
  glu_backward(a, activation, dtype, threads);
}

}  // namespace

BINDINGS(glu) {
  m.def("glu_forward", forward, NoGil());
  m.def("glu_backward", backward, NoGil());
}
