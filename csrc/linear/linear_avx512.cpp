#include "linear/linear_kernels.h"

const LinearKernels linear_avx512[3] = {
    LinearOf<LongSums, F32>::table(), LinearOf<WidenedEngine, BF16>::table(),
    LinearOf<WidenedEngine, F16>::table()};
