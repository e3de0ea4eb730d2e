#include "adamw/adamw_kernels.h"

const AdamWKernels adamw_avx512bf16 = {step};
