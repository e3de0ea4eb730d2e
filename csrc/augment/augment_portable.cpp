#include "augment/augment_kernels.h"

const AugmentKernels augment_portable = AUGMENT_KERNELS;
