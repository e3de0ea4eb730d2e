#include "linear/linear_kernels.h"

const LinearKernels linear_amx[2] = {LinearOf<TileEngine, BF16>::table(),
                                     LinearOf<WidenedEngine, F16>::table()};
