#include "adamw/adamw_kernels.h"

const AdamWKernels adamw_avx2 = {step};
