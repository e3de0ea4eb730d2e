// A row of the output through any map: rotations, shears, perspectives, and what they compose to.
// Included once for each instruction set.
#pragma once

#include "augment/sampling.h"

namespace {

ALWAYS_INLINE inline Vec floor(Vec v) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_floor_ps(v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_floorf(v[i]);
  return v;
#endif
}

struct Points {
  Vec x, y;
};

// Where the centres of the output's pixels [x, x + kLanes) of a row lie in what `m` maps to.
ALWAYS_INLINE inline Points points_at(const double* m, bool projective, int64_t row, int64_t x,
                                      Vec steps) {
  const double u = double(x) + 0.5, v = double(row) + 0.5;
  Points p = {fma(steps, splat(float(m[0])), splat(float(m[0] * u + m[1] * v + m[2]))),
              fma(steps, splat(float(m[3])), splat(float(m[3] * u + m[4] * v + m[5])))};
  if (projective) {
    Vec w = fma(steps, splat(float(m[6])), splat(float(m[6] * u + m[7] * v + m[8])));
    // Behind the horizon there is nothing: far outside of every image.
    const Vec scale = w > 1e-6f ? 1.0f / w : splat(0.0f);
    p.x = w > 1e-6f ? p.x * scale : splat(-1e9f);
    p.y = w > 1e-6f ? p.y * scale : splat(-1e9f);
  }
  return p;
}

ALWAYS_INLINE inline Vec clamped(Vec v, float low, float high) {
  return min(max(v, splat(low)), splat(high));
}

// The share of each pixel of a row that is inside of every image on the way; whether any is not.
inline bool cover_of(const AugmentMap& a, int64_t row, Vec steps, float* cover) {
  const bool soft = a.interpolation != kNearest;
  if (!a.projective) {  // a row is a line: inside, if both of its ends are
    bool inside = true;
    for (int k = 0; k < a.frames; ++k)
      for (int end = 0; end < 2; ++end) {
        const AugmentFrame& f = a.frame[k];
        const double u = end ? double(a.width) - 0.5 : 0.5, v = double(row) + 0.5;
        const double x = f.m[0] * u + f.m[1] * v + f.m[2], y = f.m[3] * u + f.m[4] * v + f.m[5];
        inside &= x > 0.501 && x < f.width - 0.501 && y > 0.501 && y < f.height - 0.501;
      }
    if (inside) return false;
  }
  Ints below = splat_int(0);
  for (int64_t x = 0; x < a.width; x += kLanes) {
    Vec share = splat(1.0f);
    for (int k = 0; k < a.frames; ++k) {
      const AugmentFrame& f = a.frame[k];
      const Points p = points_at(f.m, a.projective, row, x, steps);
      const Vec far_x = float(f.width) - p.x, far_y = float(f.height) - p.y;
      if (soft) {
        share *= clamped(p.x + 0.5f, 0.0f, 1.0f) * clamped(far_x + 0.5f, 0.0f, 1.0f);
        share *= clamped(p.y + 0.5f, 0.0f, 1.0f) * clamped(far_y + 0.5f, 0.0f, 1.0f);
      } else {
        const Ints inside = (p.x >= 0.0f) & (far_x > 0.0f) & (p.y >= 0.0f) & (far_y > 0.0f);
        share = inside ? share : splat(0.0f);
      }
    }
    below |= share < 1.0f;
    store<F32>(cover + x, share);
  }
  int any = 0;
  for (int i = 0; i < kLanes; ++i) any |= below[i];
  return any != 0;
}

// A window of the filter along one axis, cut off where the source ends; its weights are of sum 1.
struct Window {
  int64_t first;
  int taps;
  float weights[64];
};

inline void window_at(float centre, float half_width, bool bicubic, int64_t low, int64_t high,
                      Window& window) {
  const float reach = bicubic ? 2 * half_width : half_width;
  int64_t first = int64_t(__builtin_floorf(centre - reach + 0.5f));
  int64_t end = int64_t(__builtin_floorf(centre + reach + 0.5f));
  first = first < low ? low : first;
  end = end > high ? high : end;
  end = end > first + 64 ? first + 64 : end;
  float sum = 0;
  window.first = first;
  window.taps = int(end - first);
  for (int k = 0; k < window.taps; ++k) {
    const float at = (float(first + k) + 0.5f - centre) / half_width;
    sum += window.weights[k] = bicubic ? cubic(at) : tent(at);
  }
  for (int k = 0; k < window.taps; ++k) window.weights[k] /= sum;
}

inline void filtered_pixels(const AugmentMap& a, const AugmentScratch& scratch,
                            float* const* planes) {
  const AugmentImage& s = a.source;
  const bool bicubic = a.interpolation == kBicubic;
  Window x, y;
  for (int64_t i = 0; i < a.width; ++i) {
    window_at(scratch.x[i], a.half_width, bicubic, a.x0, a.x1, x);
    window_at(scratch.y[i], a.half_width, bicubic, a.y0, a.y1, y);
    for (int channel = 0; channel < a.channels; ++channel) {
      const uint8_t* from = s.at + y.first * s.row + x.first * s.pixel + channel * s.plane;
      float total = 0;
      for (int j = 0; j < y.taps; ++j, from += s.row) {
        float sum = 0;
        for (int k = 0; k < x.taps; ++k) sum += x.weights[k] * from[k * s.pixel];
        total += y.weights[j] * sum;
      }
      planes[channel][i] = bicubic ? within_bytes(total) : total;
    }
  }
}

inline void nearest_pixels(const AugmentMap& a, const AugmentScratch& scratch,
                           float* const* planes) {
  const AugmentImage& s = a.source;
  for (int64_t i = 0; i < a.width; ++i) {
    const uint8_t* from = s.at + int64_t(scratch.y[i]) * s.row + int64_t(scratch.x[i]) * s.pixel;
    for (int channel = 0; channel < a.channels; ++channel)
      planes[channel][i] = float(from[channel * s.plane]);
  }
}

// Bilinear between r g b r g b of two rows: bytes times weights of 127 in sum, then words times
// weights of 2^14.
constexpr float kBilinearScale = 1.0f / (127 * 16384);

#if defined(__AVX2__)
ALWAYS_INLINE inline __m128i two_pixels(const uint8_t* p) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
}

ALWAYS_INLINE inline __m256i pixels_at(const uint8_t* at, int64_t row, const int32_t* offsets) {
  const auto rows = [&](int i) ALWAYS_INLINE {
    const uint8_t* p = at + offsets[i];
    return _mm_unpacklo_epi8(two_pixels(p), two_pixels(p + row));
  };
  return _mm256_inserti128_si256(_mm256_castsi128_si256(rows(0)), rows(4), 1);
}

// Eight pixels, of which nothing is read beyond the 8 bytes at each offset.
ALWAYS_INLINE inline void eight_pixels(const AugmentMap& a, const AugmentScratch& scratch,
                                       int64_t i, float* const* planes) {
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, -1, -1, -1, -1));
  const __m256i columns =
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scratch.columns + i));
  const __m256i rows = _mm256_cvtepu16_epi32(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(scratch.weights_y + i)));
  __m256i sums[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m256i bytes =
        _mm256_shuffle_epi8(pixels_at(a.source.at, a.source.row, scratch.offsets + i + k), order);
    const int at = 4 * k;  // pixels k and 4 + k: each its weights all over its half
    const __m256i pick_y = _mm256_set1_epi16(short(at | (at + 1) << 8));
    const __m256i pick_x = _mm256_set1_epi32(at * 0x01010101 + 0x03020100);
    const __m256i words = _mm256_maddubs_epi16(bytes, _mm256_shuffle_epi8(rows, pick_y));
    sums[k] = _mm256_madd_epi16(words, _mm256_shuffle_epi8(columns, pick_x));
  }
  const __m256i a0 = _mm256_unpacklo_epi32(sums[0], sums[1]);
  const __m256i a1 = _mm256_unpacklo_epi32(sums[2], sums[3]);
  const __m256i b0 = _mm256_unpackhi_epi32(sums[0], sums[1]);
  const __m256i b1 = _mm256_unpackhi_epi32(sums[2], sums[3]);
  const __m256 scale = _mm256_set1_ps(kBilinearScale);
  const auto put = [&](int plane, __m256i v) ALWAYS_INLINE {
    _mm256_storeu_ps(planes[plane] + i, _mm256_mul_ps(_mm256_cvtepi32_ps(v), scale));
  };
  put(0, _mm256_unpacklo_epi64(a0, a1));
  put(1, _mm256_unpackhi_epi64(a0, a1));
  put(2, _mm256_unpacklo_epi64(b0, b1));
}
#endif

inline void one_pixel(const AugmentMap& a, const AugmentScratch& scratch, int64_t i,
                      float* const* planes) {
  const AugmentImage& s = a.source;
  const int top = scratch.weights_y[i] & 255, bottom = scratch.weights_y[i] >> 8;
  const int left = scratch.columns[i] & 65535, right = scratch.columns[i] >> 16;
  for (int channel = 0; channel < a.channels; ++channel) {
    const uint8_t* p = s.at + scratch.offsets[i] + channel * s.plane;
    const uint8_t* q = p + s.pixel;
    const int first = p[0] * top + p[s.row] * bottom, second = q[0] * top + q[s.row] * bottom;
    const int sum = first * left + second * right;
    planes[channel][i] = float(sum) * kBilinearScale;
  }
}

// The source is at least 2 x 2.
inline void bilinear_pixels(const AugmentMap& a, const AugmentScratch& scratch,
                            float* const* planes) {
  const AugmentImage& s = a.source;
  const int row = int(s.row), pixel = int(s.pixel);
  Ints furthest = splat_int(0);
  for (int64_t i = 0; i < a.width; i += kLanes) {
    const Vec x = load<F32>(scratch.x + i) - 0.5f, y = load<F32>(scratch.y + i) - 0.5f;
    const Vec left = clamped(floor(x), float(a.x0), float(a.x1 - 2));
    const Vec top = clamped(floor(y), float(a.y0), float(a.y1 - 2));
    const Vec right_share = clamped(x - left, 0.0f, 1.0f);
    const Ints right = __builtin_convertvector(round(right_share * 16384.0f), Ints);
    const Ints below = __builtin_convertvector(
        round(clamped(y - top, 0.0f, 1.0f) * 127.0f), Ints);
    const Ints offsets = __builtin_convertvector(top, Ints) * row +
                         __builtin_convertvector(left, Ints) * pixel;
    const Ints columns = (16384 - right) | right << 16;
    const Half rows = __builtin_convertvector((127 - below) | below << 8, Half);
    furthest = offsets > furthest ? offsets : furthest;
    memcpy(scratch.offsets + i, &offsets, sizeof offsets);
    memcpy(scratch.columns + i, &columns, sizeof columns);
    memcpy(scratch.weights_y + i, &rows, sizeof rows);
  }
  int64_t i = 0;
#if defined(__AVX2__)
  if (s.pixel == 3 && s.plane == 1) {
    // 8 bytes are read for 6: not at the end of the last row, which may be that of the memory.
    const int64_t last = (s.height - 2) * s.row + s.width * 3 - 8;
    bool all_safe = true;
    for (int k = 0; k < kLanes; ++k) all_safe &= furthest[k] <= last;
    for (; i + 8 <= a.width; i += 8) {
      bool safe = all_safe;
      if (!all_safe) {
        safe = true;
        for (int k = 0; k < 8; ++k) safe &= scratch.offsets[i + k] <= last;
      }
      if (safe)
        eight_pixels(a, scratch, i, planes);
      else
        for (int k = 0; k < 8; ++k) one_pixel(a, scratch, i + k, planes);
    }
  }
#endif
  for (; i < a.width; ++i) one_pixel(a, scratch, i, planes);
}

inline void map_row(const AugmentMap& a, int64_t row, const AugmentScratch& scratch,
                    float* const* planes) {
  const Vec steps = __builtin_convertvector(lane_numbers(), Vec);
  const bool nearest = a.interpolation == kNearest;
  const float inset = nearest ? 0.0f : 0.5f;
  for (int64_t x = 0; x < a.width; x += kLanes) {
    const Points p = points_at(a.m, a.projective, row, x, steps);
    store<F32>(scratch.x + x, clamped(p.x, float(a.x0) + inset, float(a.x1) - 0.5f));
    store<F32>(scratch.y + x, clamped(p.y, float(a.y0) + inset, float(a.y1) - 0.5f));
  }
  if (nearest)
    nearest_pixels(a, scratch, planes);
  else if (a.interpolation == kBilinear && a.half_width == 1.0f && a.x1 - a.x0 > 1 &&
           a.y1 - a.y0 > 1)
    bilinear_pixels(a, scratch, planes);
  else
    filtered_pixels(a, scratch, planes);
  if (a.frames && cover_of(a, row, steps, scratch.cover))
    for (int channel = 0; channel < a.channels; ++channel)
      cover_row(scratch.cover, 1.0f, a.fill[channel], a.width, planes[channel]);
}

}  // namespace
