// The level of the instruction set that a file of kernels is compiled for. setup.py compiles each
// <op>_kernels.cpp once for every level that its first line names, with the level's flags and with
// -DLEVEL=avx2, for instance; the bodies are the same, and the vector type of dtype.h is not.
#pragma once

#define JOIN_LEVEL_NAMES(name, level) name##_##level
#define JOIN_LEVEL(name, level) JOIN_LEVEL_NAMES(name, level)

// The name of this level's table: AT_LEVEL(rope) is rope_avx2 where LEVEL is avx2.
#define AT_LEVEL(name) JOIN_LEVEL(name, LEVEL)
