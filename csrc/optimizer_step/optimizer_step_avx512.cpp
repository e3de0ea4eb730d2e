#include "optimizer_step/optimizer_step_kernels.h"

const StepKernels step_avx512 = kStepKernels;
