// The tables of a map along the axes: which rows and columns an output pixel reads, and with which
// weights.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "augment/augment.h"
#include "augment/composite.h"
#include "augment/pixel.h"

// One axis with weights as floats, of sum 1 for each place.
struct AxisWeights {
  std::vector<int32_t> start, taps;
  std::vector<float> weights;  // [n, most]
  int most = 1;

  void make(double scale, double offset, int64_t n, int64_t low, int64_t high, int interpolation) {
    start.resize(size_t(n));
    taps.resize(size_t(n));
    if (interpolation == kNearest) {
      most = 1;
      weights.assign(size_t(n), 1.0f);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = int64_t(std::floor(scale * (double(i) + 0.5) + offset));
        start[size_t(i)] = int32_t(std::clamp(at, low, high - 1));
        taps[size_t(i)] = 1;
      }
      return;
    }
    const bool bicubic = interpolation == kBicubic;
    const double wide = std::max(1.0, std::abs(scale)), reach = (bicubic ? 2 : 1) * wide;
    most = int(std::ceil(reach)) * 2 + 1;
    weights.resize(size_t(n * most));
    const float narrow = float(1 / wide);
    for (int64_t i = 0; i < n; ++i) {
      const double centre =
          std::clamp(scale * (double(i) + 0.5) + offset, double(low), double(high));
      int64_t first = std::max(low, int64_t(centre - reach + 0.5));
      int64_t end = std::min(high, int64_t(centre + reach + 0.5));
      float* const w = weights.data() + i * most;
      float total = 0, at = float(double(first) + 0.5 - centre) * narrow;
      const int64_t count = end - first;
      for (int64_t k = 0; k < count; ++k, at += narrow)
        total += w[k] = bicubic ? cubic(at) : tent(at);
      // Pixels at a distance of exactly `reach` do not count.
      int64_t skip = 0;
      while (skip + 1 < count && std::abs(w[skip]) < 1e-6f) ++skip;
      int64_t left = count;
      while (left - 1 > skip && std::abs(w[left - 1]) < 1e-6f) --left;
      const float inverse = 1 / total;
      for (int64_t k = skip; k < left; ++k) w[k - skip] = w[k] * inverse;
      start[size_t(i)] = int32_t(first + skip);
      taps[size_t(i)] = int32_t(left - skip);
    }
  }

  // The weights of place i as integers whose sum is `one`: a flat area stays what it is.
  template <class T>
  void whole_numbers(int64_t i, int one, T* to) const {
    const float* const w = weights.data() + i * most;
    int sum = 0, largest = 0;
    for (int k = 0; k < taps[size_t(i)]; ++k) {
      const int value = int(std::floor(w[k] * float(one) + 0.5f));
      to[k] = T(value);
      sum += value;
      if (w[k] > w[largest]) largest = k;
    }
    if (taps[size_t(i)] == 1)
      to[0] = T(one == 1 << 16 ? one - 1 : one);  // 2^16 is one too many for 16 bits
    else
      to[largest] = T(int(to[largest]) + one - sum);
  }
};

class AxesTables {
 public:
  AugmentAxes make(const Composite& map, const AugmentImage& source, int channels,
                   const AugmentKernels& kernels) {
    const int64_t w = map.width(), h = map.height();
    x_.make(map.m[0], map.m[2], w, map.x0, map.x1, map.interpolation);
    y_.make(map.m[4], map.m[5], h, map.y0, map.y1, map.interpolation);
    AugmentAxes a{};
    a.source = source;
    a.channels = channels;
    a.width = w;
    a.with_signs = map.interpolation == kBicubic;
    make_rows(a, h);
    make_columns(a.columns, w, kernels);
    a.covered = map.frames != 0 && make_cover(map);
    a.cover_x = cover_x_.data();
    a.cover_y = cover_y_.data();
    for (int c = 0; c < 3; ++c) a.fill[c] = float(map.fill[c]);
    return a;
  }

 private:
  void make_rows(AugmentAxes& a, int64_t h) {
    rows_.resize(size_t(h * y_.most));
    for (int64_t i = 0; i < h; ++i) {
      uint16_t* const to = rows_.data() + i * y_.most;
      if (a.with_signs)
        y_.whole_numbers(i, 1 << 14, reinterpret_cast<int16_t*>(to));
      else
        y_.whole_numbers(i, 1 << 16, to);
    }
    a.rows = {y_.most, y_.start.data(), y_.taps.data(), rows_.data()};
  }

  void make_columns(AugmentColumns& c, int64_t w, const AugmentKernels& kernels) {
    int taps = 1;
    int64_t first = x_.start[0], end = 0;
    for (int64_t i = 0; i < w; ++i) {
      taps = std::max(taps, x_.taps[size_t(i)]);
      first = std::min<int64_t>(first, x_.start[size_t(i)]);
      end = std::max<int64_t>(end, x_.start[size_t(i)] + x_.taps[size_t(i)]);
    }
    taps = (taps + 1) / 2 * 2;
    columns_.assign(size_t(w * taps), 0);
    starts_.resize(size_t(w));
    bool windows = taps <= 6;
    for (int64_t i = 0; i < w; ++i) {
      x_.whole_numbers(i, 1 << 14, columns_.data() + i * taps);
      starts_[size_t(i)] = int32_t(x_.start[size_t(i)] - first);
    }
    for (int64_t i = 0; windows && i < w; i += 4) {
      const auto begin = starts_.begin() + i, last = starts_.begin() + std::min(i + 4, w);
      const auto [low, high] = std::minmax_element(begin, last);
      windows = *high - *low + taps <= 16;
    }
    const size_t padded = size_t((w + 15) / 16 * 16);
    bases_.assign(padded / 4, 0);
    masks_.assign(padded * size_t(taps) * 2, 0x80);
    pairs_.assign(padded * size_t(taps), 0);
    c = {first,  end - first,   taps,          starts_.data(), columns_.data(),
         windows, bases_.data(), masks_.data(), pairs_.data()};
    if (windows) kernels.pack_columns(c, w);
  }

  // Along an axis a frame's cover is a function of that axis alone. False if all is inside.
  bool make_cover(const Composite& map) {
    const bool soft = map.interpolation != kNearest;
    bool any = false;
    const auto fill_in = [&](std::vector<float>& cover, int64_t n, int at, bool across) {
      cover.assign(size_t((n + 15) / 16 * 16), 1.0f);
      for (int k = 0; k < map.frames; ++k) {
        const AugmentFrame& f = map.frame[k];
        const double end = across ? f.width : f.height;
        for (int64_t i = 0; i < n; ++i) {
          const double p = f.m[at] * (double(i) + 0.5) + f.m[at == 0 ? 2 : 5];
          const double share = soft ? std::clamp(p + 0.5, 0.0, 1.0) *
                                          std::clamp(end - p + 0.5, 0.0, 1.0)
                                    : double(p >= 0 && p < end);
          cover[size_t(i)] *= float(share);
          any |= cover[size_t(i)] < 1;
        }
      }
    };
    fill_in(cover_x_, map.width(), 0, true);
    fill_in(cover_y_, map.height(), 4, false);
    return any;
  }

  AxisWeights x_, y_;
  std::vector<uint16_t> rows_;
  std::vector<int16_t> columns_, pairs_;
  std::vector<int32_t> starts_, bases_;
  std::vector<uint8_t> masks_;
  std::vector<float> cover_x_, cover_y_;
};
