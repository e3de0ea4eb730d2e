#include "augment/augment_kernels.h"

const AugmentKernels augment_avx2 = AUGMENT_KERNELS;
