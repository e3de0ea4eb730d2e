#include "linear/linear_kernels.h"

const LinearKernels linear_avx512bf16 = LinearOf<Bf16Engine>::table();
