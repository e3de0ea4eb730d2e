// The part of the native module that optimizers use (plan_bindings.cpp).
#pragma once

#include <pybind11/pybind11.h>

void bind_plans(pybind11::module_& m);
