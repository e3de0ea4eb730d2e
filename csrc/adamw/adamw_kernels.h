// The kernel body. Included once by adamw_{portable,avx2,avx512}.cpp, each compiled with its flags.
#pragma once

#include "adamw/adamw.h"
#include "common/dtype.h"

namespace {

template <class P, class G>
void step_typed(const AdamWTensor& t, const AdamWScalars& a, int64_t begin, int64_t end) {
  typename P::T* param = static_cast<typename P::T*>(t.param);
  const typename G::T* grad = static_cast<const typename G::T*>(t.grad);
  const Vec one_minus_beta1 = splat(a.one_minus_beta1), one_minus_beta2 = splat(a.one_minus_beta2);
  const Vec eps = splat(a.eps), decay = splat(-a.decay), step_size = splat(-t.step_size);
  const Vec inverse_correction = splat(t.inverse_correction);

  const auto update = [&](int64_t j, int64_t n) ALWAYS_INLINE {
    const Vec g = load<G>(grad + j, n);
    Vec p = load<P>(param + j, n);
    Vec m = load<F32>(t.exp_avg + j, n), v = load<F32>(t.exp_avg_sq + j, n);
    m = fma(g - m, one_minus_beta1, m);
    v = fma(fma(g, g, -v), one_minus_beta2, v);
    const Vec denominator = fma(square_root(v), inverse_correction, eps);
    p = fma(step_size, m / denominator, fma(decay, p, p));
    store<P>(param + j, p, n);
    store<F32>(t.exp_avg + j, m, n);
    store<F32>(t.exp_avg_sq + j, v, n);
  };
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes) update(j, kLanes);
  if (j < end) update(j, end - j);
}

void step(const AdamWTensor& t, const AdamWScalars& a, int64_t begin, int64_t end) {
  if (t.param_dtype == kFloat32) {
    if (t.grad_dtype == kFloat32)
      step_typed<F32, F32>(t, a, begin, end);
    else
      step_typed<F32, BF16>(t, a, begin, end);
  } else {
    if (t.grad_dtype == kFloat32)
      step_typed<BF16, F32>(t, a, begin, end);
    else
      step_typed<BF16, BF16>(t, a, begin, end);
  }
}

}  // namespace
