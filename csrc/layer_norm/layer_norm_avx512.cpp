#include "layer_norm/layer_norm_kernels.h"

const LayerNormKernels layer_norm_avx512 = {forward, backward, sums};
