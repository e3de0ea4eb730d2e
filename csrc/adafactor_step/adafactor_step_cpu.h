// What the bindings call: an Adafactor step on the CPU, on the instruction set and threads at hand.
#pragma once

#include <vector>

#include "adafactor_step/adafactor_step.h"

// The bits follow from the shapes, not from the number of threads. Throws std::bad_alloc.
void adafactor_step(const std::vector<FactorTensor>& tensors, const FactorOptions& options,
                    int threads);
