// The part of the native module that augmentation uses (augment_bindings.cpp).
#pragma once

#include <pybind11/pybind11.h>

void bind_augment(pybind11::module_& m);
