#include "adamw/adamw_kernels.h"

const AdamWKernels adamw_portable = {step};
