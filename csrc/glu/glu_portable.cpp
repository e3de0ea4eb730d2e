#include "glu/glu_kernels.h"

const GluKernels glu_portable = {forward, backward};
