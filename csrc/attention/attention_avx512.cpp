#include "attention/attention_kernels.h"

const AttentionKernels attention_avx512[3] = {
    kernels<FloatEngine, F32>(), kernels<WidenedEngine, BF16>(), kernels<WidenedEngine, F16>()};
