#include "layer_norm/layer_norm_kernels.h"

const LayerNormKernels layer_norm_avx2 = {forward, backward, sums};
