// What the bindings call: gated linear units on the CPU, on the instruction set and the threads at
// hand.
#pragma once

#include "glu/glu.h"

void glu_forward(const GluForward&, int activation, int dtype, int threads);
void glu_backward(const GluBackward&, int activation, int dtype, int threads);
