// What kernels over tensors of any dtype share: loads and stores whose dtype is known at run time
// (the branch is predicted, so combinations of dtypes need no code of their own), and vectors up to
// the end of a row. In an anonymous namespace for the reason given in common/dtype.h.
#pragma once

#include "common/dtype.h"

namespace {

ALWAYS_INLINE inline Vec load_any(const void* from, int dtype, int64_t j, int64_t n) {
  if (dtype == kFloat32) return load<F32>(static_cast<const float*>(from) + j, n);
  if (dtype == kBFloat16) return load<BF16>(static_cast<const uint16_t*>(from) + j, n);
  return load<F16>(static_cast<const uint16_t*>(from) + j, n);
}

ALWAYS_INLINE inline void store_any(void* to, int dtype, int64_t j, Vec v, int64_t n) {
  if (dtype == kFloat32) return store<F32>(static_cast<float*>(to) + j, v, n);
  if (dtype == kBFloat16) return store<BF16>(static_cast<uint16_t*>(to) + j, v, n);
  store<F16>(static_cast<uint16_t*>(to) + j, v, n);
}

// f(first, count) for each vector of `size` elements. In a whole one the count is a constant.
template <class F>
ALWAYS_INLINE inline void each_vector(int64_t size, F&& f) {
  int64_t at = 0;
  for (; at + kLanes <= size; at += kLanes) f(at, kLanes);
  if (at < size) f(at, size - at);
}

inline Vec magnitude(Vec v) { return (Vec)((Bits)v & 0x7fffffffu); }

// Every lane moved towards 0 by the threshold, where it stops.
ALWAYS_INLINE inline Vec shrink(Vec x, Vec threshold) {
  const Vec size = magnitude(x) - threshold;
  const Vec left = size <= 0.0f ? splat(0.0f) : size;  // NaN stays NaN
  return (Vec)((Bits)left | ((Bits)x & 0x80000000u));
}

}  // namespace
