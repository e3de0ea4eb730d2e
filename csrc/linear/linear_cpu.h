// What the bindings call: the products of a linear layer on the CPU.
#pragma once

#include "linear/linear.h"

void linear_product(const LinearProduct& p, int dtype, int threads);
