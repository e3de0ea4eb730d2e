// Functions on `Vec` beyond arithmetic: rounding, powers, tanh, comparisons by lane.
#pragma once

#include "common/dtype.h"

namespace {

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

inline Ints splat_int(int32_t value) { return value - Ints{}; }

inline Ints lane_numbers() {
  Ints lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// Like max: b where one of them is NaN.
ALWAYS_INLINE inline Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// b where one of them is NaN.
ALWAYS_INLINE inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline bool any_lane_differs(Vec v, float from) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(v, splat(from), _CMP_NEQ_UQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(v, splat(from), _CMP_NEQ_UQ)) != 0;
#else
  bool differs = false;
  for (int i = 0; i < kLanes; ++i) differs |= v[i] != from;
  return differs;
#endif
}

// To the nearest integer, halves to even; |v| <= 2^22 where the instruction set has no rounding.
ALWAYS_INLINE inline Vec round(Vec v) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec magic = splat(0x1.8p23f);
  return (v + magic) - magic;
#endif
}

ALWAYS_INLINE inline Vec ceil(Vec v) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_ceil_ps(v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_ceilf(v[i]);
  return v;
#endif
}

// v * 2^k for whole k of any size, v in [0.25, 4]. A result below the normal numbers may be 0.
ALWAYS_INLINE inline Vec scale_by_power(Vec v, Vec k) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(v, k);
#else
  k = min(splat(128.0f), max(splat(-127.0f), k));
  const Ints exponent = __builtin_convertvector(k, Ints) + 127;
  return v * reinterpret_cast<Vec>(exponent << 23);
#endif
}

// 2^f for f in [-0.5, 0.5], to one unit in the last place: the minimax polynomial of degree 6,
// whose relative error is 1.9e-9 there and 100 times that up to [-1, 1].
ALWAYS_INLINE inline Vec power_of_two(Vec f) {
  Vec p = fma(splat(0.0001534581242594868f), f, splat(0.0013399930903688073f));
  p = fma(p, f, splat(0.009618489071726799f));
  p = fma(p, f, splat(0.05550328642129898f));
  p = fma(p, f, splat(0.24022646248340607f));
  p = fma(p, f, splat(0.6931471824645996f));
  return fma(p, f, splat(1.0f));
}

// e^x to about one unit in the last place; 0 below -104; infinite from 88.73 on, without AVX-512
// from 88.38 on.
ALWAYS_INLINE inline Vec exponential(Vec x) {
  x = x < -200.0f ? splat(-200.0f) : x;
  x = x > 200.0f ? splat(200.0f) : x;
  const Vec n = round(x * 0x1.715476p+0f);
  // log2(e) in two parts: the rounding of one would be the power's error.
  const Vec f = fma(x, splat(0x1.4ae0cp-26f), fma(x, splat(0x1.715476p+0f), -n));
  return scale_by_power(power_of_two(f), n);
}

// 2^x for any x with a relative error of at most 2.6e-6 (2^-18.5: far below what 16 bits keep): the
// minimax polynomial of degree 4 in what x is above a whole number (AVX-512: six instructions), or
// away from the nearest one. A result below the normal numbers may be 0.
ALWAYS_INLINE inline Vec coarse_power_of_two(Vec x) {
#if defined(__AVX512F__)
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec p = fma(splat(0.013534167781472206f), f, splat(0.052011460065841675f));
  p = fma(p, f, splat(0.2414427548646927f));
  p = fma(p, f, splat(0.6930038332939148f));
  p = fma(p, f, splat(1.0000026226043701f));
  return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
#else
  x = min(splat(128.0f), max(splat(-127.0f), x));  // NaN stays NaN
  const Vec n = round(x), f = x - n;
  Vec p = fma(splat(0.009567738510668278f), f, splat(0.05591749772429466f));
  p = fma(p, f, splat(0.24024811387062073f));
  p = fma(p, f, splat(0.6931219100952148f));
  p = fma(p, f, splat(0.9999992251396179f));
  const Ints exponent = __builtin_convertvector(n, Ints) + 127;
  return p * reinterpret_cast<Vec>(exponent << 23);
#endif
}

// tanh to about one unit in the last place: Cephes' rational form below 0.625, where the other
// loses digits, and 1 - 2 / (e^2|x| + 1) above.
ALWAYS_INLINE inline Vec tanh(Vec x) {
  const Vec magnitude = x < 0.0f ? -x : x;
  const Vec z = x * x;
  Vec p = fma(splat(-5.70498872745e-3f), z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  const Vec small = fma(p * z, x, x);
  const Vec clamped = magnitude > 10.0f ? splat(10.0f) : magnitude;  // 1 in float32 from 9.02 on
  // e^2x as 2^n 2^f, with 2 log2(e) in two parts: one rounding of the product would be e^2x's
  // error.
  const Vec n = round(clamped * 2.885390081777927f);
  Vec f = fma(clamped, splat(0x1.715476p+1f), -n);
  f = fma(clamped, splat(0x1.4ae0cp-25f), f);
  const Vec e = scale_by_power(power_of_two(f), n);
  const Vec large = 1.0f - 2.0f / (e + 1.0f);
  const Vec chosen = magnitude < 0.625f ? small : (x < 0.0f ? -large : large);
  return x == x ? chosen : x;
}

// The first word of Philox4x32-7 (Salmon et al. 2011), one counter a lane.
struct Philox {
  uint32_t key0, key1;

  static void multiply(Bits a, uint32_t b, Bits& high, Bits& low) {
    const Bits al = a & 0xffff, ah = a >> 16;
    const uint32_t bl = b & 0xffff, bh = b >> 16;
    const Bits ll = al * bl, lh = al * bh, hl = ah * bl;
    const Bits middle = (ll >> 16) + (lh & 0xffff) + (hl & 0xffff);
    high = ah * bh + (lh >> 16) + (hl >> 16) + (middle >> 16);
    low = a * b;
  }

  Bits operator()(Bits c0, Bits c1, Bits c2, Bits c3) const {
    uint32_t k0 = key0, k1 = key1;
    for (int i = 0; i < 7; ++i) {
      Bits high0, low0, high1, low1;
      multiply(c0, 0xD2511F53u, high0, low0);
      multiply(c2, 0xCD9E8D57u, high1, low1);
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return c0;
  }
};

}  // namespace
