#include "linear/linear_kernels.h"

const LinearKernels linear_amx = LinearOf<TileEngine>::table();
