#include "linear/linear_kernels.h"

const LinearKernels linear_avx512 = LinearOf<FloatEngine>::table();
