#include "attention/attention_kernels.h"

const AttentionKernels attention_avx512bf16[3] = {
    kernels<FloatEngine, F32>(), kernels<Bf16Engine, BF16>(), kernels<WidenedEngine, F16>()};
