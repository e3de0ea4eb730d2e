#include "linear/linear_kernels.h"

const LinearKernels linear_amx[3] = {
    LinearOf<LongSums, F32>::table(), LinearOf<TileEngine, BF16>::table(),
    LinearOf<WidenedEngine, F16>::table()};
