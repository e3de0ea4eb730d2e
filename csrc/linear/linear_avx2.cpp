#include "linear/linear_kernels.h"

const LinearKernels linear_avx2[2] = {LinearOf<WidenedEngine, BF16>::table(),
                                      LinearOf<WidenedEngine, F16>::table()};
