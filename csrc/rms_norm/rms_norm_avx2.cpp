#include "rms_norm/rms_norm_kernels.h"

const RmsNormKernels rms_norm_avx2 = {forward, backward, dweight};
