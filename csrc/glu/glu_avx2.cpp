#include "glu/glu_kernels.h"

const GluKernels glu_avx2 = {forward, backward};
