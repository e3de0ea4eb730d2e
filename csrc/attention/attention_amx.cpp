#include "attention/attention_kernels.h"

const AttentionKernels attention_amx[3] = {kernels<FloatEngine, F32>(),
                                           kernels<TileEngine, BF16>(),
                                           kernels<WidenedEngine, F16>()};
