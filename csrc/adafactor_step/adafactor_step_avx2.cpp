#include "adafactor_step/adafactor_step_kernels.h"

const AdafactorKernels adafactor_avx2 = kAdafactorKernels;
