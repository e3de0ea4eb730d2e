#include "glu/glu_kernels.h"

const GluKernels glu_avx512 = {forward, backward};
