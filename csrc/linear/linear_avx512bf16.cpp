#include "linear/linear_kernels.h"

const LinearKernels linear_avx512bf16[3] = {
    LinearOf<LongSums, F32>::table(), LinearOf<Bf16Engine, BF16>::table(),
    LinearOf<WidenedEngine, F16>::table()};
