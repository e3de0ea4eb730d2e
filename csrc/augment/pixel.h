// The arithmetic of a pixel, for CPU and GPU alike: V is a float, or a vector of them. In an
// anonymous namespace for the reason given in common/dtype.h.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define PIXEL __host__ __device__ inline
#else
#define PIXEL __attribute__((always_inline)) inline
#endif

namespace {

template <class V>
PIXEL V least(V a, V b) {
  return a < b ? a : b;
}
template <class V>
PIXEL V most(V a, V b) {
  return a > b ? a : b;
}
template <class V>
PIXEL V within_bytes(V x) {
  return most(least(x, V{} + 255.0f), V{});
}

// ITU-R 601-2 luma, with the digits of torchvision.
template <class V>
PIXEL V gray_of(V r, V g, V b) {
  return r * 0.2989f + g * 0.587f + b * 0.114f;
}

template <class V>
PIXEL void saturate(V& r, V& g, V& b, float factor) {
  const V rest = gray_of(r, g, b) * (1.0f - factor);
  r = within_bytes(r * factor + rest);
  g = within_bytes(g * factor + rest);
  b = within_bytes(b * factor + rest);
}

// The hexagon's six edges: v - range * max(0, min(k, 4 - k, 1)), k = (n + hue) mod 6.
template <class V>
PIXEL V hexagon(V high, V range, V hue, float n) {
  V k = hue + n;
  k = k >= 6.0f ? k - 6.0f : k;
  const V share = most(least(least(k, 4.0f - k), V{} + 1.0f), V{});
  return high - range * share;
}

// Hue is an angle around the gray axis, in sixths of a turn; value and saturation stay.
template <class V>
PIXEL void shift_hue(V& r, V& g, V& b, float sixths) {
  const V high = most(most(r, g), b), low = least(least(r, g), b), range = high - low;
  const V inverse = 1.0f / (range > 0.0f ? range : V{} + 1.0f);
  V hue = high == r ? (g - b) * inverse
                    : (high == g ? (b - r) * inverse + 2.0f : (r - g) * inverse + 4.0f);
  hue = hue + sixths;  // in [-1 - 3, 5 + 3]
  hue = hue < 0.0f ? hue + 6.0f : hue;
  hue = hue >= 6.0f ? hue - 6.0f : hue;
  r = hexagon(high, range, hue, 5.0f);
  g = hexagon(high, range, hue, 3.0f);
  b = hexagon(high, range, hue, 1.0f);
}

template <class V>
PIXEL V solarized(V x, float threshold) {
  return x >= threshold ? 255.0f - x : x;
}

// Weights at distance x, in pixels: the tent, and Keys' cubic with a = -1/2 (Catmull-Rom, Pillow).
template <class V>
PIXEL V tent(V x) {
  x = x < 0.0f ? -x : x;
  return x < 1.0f ? 1.0f - x : V{};
}
template <class V>
PIXEL V cubic(V x) {
  x = x < 0.0f ? -x : x;
  const V near = (1.5f * x - 2.5f) * x * x + 1.0f;
  const V far = ((-0.5f * x + 2.5f) * x - 4.0f) * x + 2.0f;
  return x < 1.0f ? near : (x < 2.0f ? far : V{});
}

struct Random {
  uint32_t word[4];
};

// Philox4x32-10 (Salmon et al. 2011): 128 random bits for a counter and a key.
PIXEL Random philox(Random c, uint64_t key) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c.word[0], b = uint64_t(0xCD9E8D57u) * c.word[2];
    c = {{uint32_t(b >> 32) ^ c.word[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c.word[3] ^ k1,
          uint32_t(a)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace
