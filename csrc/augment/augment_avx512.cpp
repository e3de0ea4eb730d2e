#include "augment/augment_kernels.h"

const AugmentKernels augment_avx512 = AUGMENT_KERNELS;
