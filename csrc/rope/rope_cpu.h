// What the bindings call: rotary embedding on the CPU, on the instruction set and threads at hand.
#pragma once

#include "rope/rope.h"

void rope(const Rope&, int64_t batch, int dtype, int threads);
