#include "attention/attention_kernels.h"

const AttentionKernels attention_portable[3] = {kernels<FloatEngine, F32>(), kernels<FloatEngine, BF16>(),
                                          kernels<FloatEngine, F16>()};
