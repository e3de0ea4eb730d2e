#include "rope/rope_kernels.h"

const RopeKernels rope_portable = {rotate};
