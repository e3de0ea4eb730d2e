#include "optimizer_step/optimizer_step_kernels.h"

const StepKernels step_avx2 = kStepKernels;
