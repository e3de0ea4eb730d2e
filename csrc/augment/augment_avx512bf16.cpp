#include "augment/augment_kernels.h"

const AugmentKernels augment_avx512bf16 = AUGMENT_KERNELS;
