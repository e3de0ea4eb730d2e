// What the bindings call: one AdamW step on the CPU, on the instruction set and threads at hand.
#pragma once

#include <vector>

#include "adamw/adamw.h"

void adamw_step(const std::vector<AdamWTensor>&, const AdamWScalars&, int threads);
