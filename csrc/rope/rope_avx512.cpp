#include "rope/rope_kernels.h"

const RopeKernels rope_avx512 = {rotate};
