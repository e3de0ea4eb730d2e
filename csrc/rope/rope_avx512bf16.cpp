#include "rope/rope_kernels.h"

const RopeKernels rope_avx512bf16 = {rotate};
