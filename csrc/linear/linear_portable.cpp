#include "linear/linear_kernels.h"

const LinearKernels linear_portable = LinearOf<FloatEngine>::table();
