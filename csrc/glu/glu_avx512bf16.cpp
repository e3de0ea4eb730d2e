#include "glu/glu_kernels.h"

const GluKernels glu_avx512bf16 = {forward, backward};
