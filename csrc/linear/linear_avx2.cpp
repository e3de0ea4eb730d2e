#include "linear/linear_kernels.h"

const LinearKernels linear_avx2 = LinearOf<FloatEngine>::table();
