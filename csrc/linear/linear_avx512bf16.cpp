#include "linear/linear_kernels.h"

const LinearKernels linear_avx512bf16[2] = {LinearOf<Bf16Engine, BF16>::table(),
                                            LinearOf<WidenedEngine, F16>::table()};
