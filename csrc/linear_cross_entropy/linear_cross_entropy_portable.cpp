#include "linear_cross_entropy/linear_cross_entropy_kernels.h"

const LinearCrossEntropyTable linear_cross_entropy_portable = table<WidenedEngine>();
