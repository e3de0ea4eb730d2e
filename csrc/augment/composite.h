// Geometry that is still to be done: the steps so far as one map from the output to the source.
#pragma once

#include <algorithm>
#include <cmath>

#include "augment/augment.h"

// What a geometric step does where it reads beyond its input.
enum Beyond : int { kCut = 0, kClamp = 1, kFill = 2 };

class Composite {
 public:
  void start(int64_t height, int64_t width) {
    *this = Composite();
    height_ = y1 = height;
    width_ = x1 = width;
  }

  // Adds a step to the others; false if that may not be: then they have to be done first.
  bool add(const double* p) {
    double next[9];
    multiply(m, p, next);
    const int beyond = int(p[12]);
    const bool fills = beyond == kFill, fresh = whole_pixels();
    if (fills && (frames == kMostFrames || (frames && !std::equal(fill, fill + 3, p + 13))))
      return false;
    // What shrinks and turns: the shrinking goes first, along the axes and with its own filter.
    const double h = double(height_), w = double(width_);
    if (!fresh && !aligned(next) && (shrinks(m, h, w) || shrinks(next, p[9], p[10])))
      return false;
    for (int k = 0; k < frames; ++k) {
      double moved[9];
      multiply(frame[k].m, p, moved);
      std::copy(moved, moved + 9, frame[k].m);
    }
    if (fills) {
      AugmentFrame& f = frame[frames++];
      std::copy(p, p + 9, f.m);
      f.width = double(width_);
      f.height = double(height_);
      std::copy(p + 13, p + 16, fill);
    }
    std::copy(next, next + 9, m);
    height_ = int64_t(p[9]);
    width_ = int64_t(p[10]);
    interpolation = std::max(interpolation, int(p[11]));
    if (beyond == kCut && fresh && whole_pixels()) cut();
    return true;
  }

  int64_t height() const { return height_; }
  int64_t width() const { return width_; }
  bool aligned() const { return aligned(m); }
  float half_width() const { return float(shrink(m, double(height_), double(width_))); }
  bool projective() const { return m[6] != 0 || m[7] != 0; }

  double m[9] = {1, 0, 0, 0, 1, 0, 0, 0, 1};
  int64_t x0 = 0, y0 = 0, x1 = 0, y1 = 0;  // the part of the source that exists
  int interpolation = kNearest, frames = 0;
  AugmentFrame frame[kMostFrames];
  double fill[3] = {};

  static bool aligned(const double* m) {
    constexpr double kNone = 1e-9;
    return std::abs(m[1]) < kNone && std::abs(m[3]) < kNone && m[6] == 0 && m[7] == 0;
  }

 private:
  int64_t height_ = 0, width_ = 0;

  static void multiply(const double* a, const double* b, double* to) {
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j)
        to[3 * i + j] = a[3 * i] * b[j] + a[3 * i + 1] * b[3 + j] + a[3 * i + 2] * b[6 + j];
  }

  // How far the map shrinks in the middle of its output, in the mean of both directions: 1 or more.
  static double shrink(const double* m, double height, double width) {
    const double x = width / 2, y = height / 2, w = m[6] * x + m[7] * y + m[8];
    const double u = (m[0] * x + m[1] * y + m[2]) / w, v = (m[3] * x + m[4] * y + m[5]) / w;
    const double a = m[0] - u * m[6], b = m[1] - u * m[7];
    const double c = m[3] - v * m[6], d = m[4] - v * m[7];
    return std::max(1.0, std::sqrt(std::abs(a * d - b * c)) / std::abs(w));
  }
  // Whether it does at all: what does not turn, along either axis.
  static bool shrinks(const double* m, double height, double width) {
    const bool axes = aligned(m);
    return std::max({shrink(m, height, width), std::abs(m[0]) * axes, std::abs(m[4]) * axes}) >
           1 + 1e-6;
  }

  // Only crops, pads and flips so far: each output pixel is one of the source's.
  bool whole_pixels() const {
    const auto unit = [](double x) { return x == 1 || x == -1; };
    return aligned() && unit(m[0]) && unit(m[4]) && m[2] == std::floor(m[2]) &&
           m[5] == std::floor(m[5]);
  }

  void cut() {
    const double right = m[0] * double(width_) + m[2], bottom = m[4] * double(height_) + m[5];
    x0 = std::max(x0, int64_t(std::min(m[2], right)));
    x1 = std::min(x1, int64_t(std::max(m[2], right)));
    y0 = std::max(y0, int64_t(std::min(m[5], bottom)));
    y1 = std::min(y1, int64_t(std::max(m[5], bottom)));
  }
};
