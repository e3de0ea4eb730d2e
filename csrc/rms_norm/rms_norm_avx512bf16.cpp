#include "rms_norm/rms_norm_kernels.h"

const RmsNormKernels rms_norm_avx512bf16 = {forward, backward, dweight};
