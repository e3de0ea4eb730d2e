// levels: portable avx2 avx512 avx512bf16
// A row is read from memory once; its later passes find it in the L1 or L2 cache.
#include "common/column_sums.h"
#include "common/level.h"
#include "layer_norm/layer_norm.h"

namespace {

// What a row's elements are centred and scaled with.
struct Row {
  float mean, rest, rstd;

  ALWAYS_INLINE Vec normalise(Vec v) const {
    return fma(v - mean, splat(rstd), splat(-rest * rstd));
  }
};

// weight or bias at columns [j, j + n), in float32.
struct Parameter {
  const void* data;  // null: `otherwise` everywhere
  int dtype;
  float otherwise;

  ALWAYS_INLINE Vec at(int64_t j, int64_t n) const {
    return data ? load_any(data, dtype, j, n) : splat(otherwise);
  }
};

template <class X>
const typename X::T* row_of(const void* base, int64_t stride, int64_t i) {
  return static_cast<const typename X::T*>(base) + i * stride;
}

ALWAYS_INLINE inline double total(const Vec (&s)[4]) {
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

ALWAYS_INLINE inline void add(float* to, Vec v, int64_t n) {
  store<F32>(to, load<F32>(to, n) + v, n);
}

template <class X, bool kResidual>
struct Forward {
  using T = typename X::T;

  // Writes h and the row's statistics.
  static Row statistics(const LayerNormForward& a, int64_t i) {
    const T* x = row_of<X>(a.x, a.x_stride, i);
    const T* residual = kResidual ? row_of<X>(a.residual, a.residual_stride, i) : x;
    T* h = kResidual ? static_cast<T*>(a.h) + i * a.cols : nullptr;
    const int64_t cols = a.cols;

    // Four sums, so that one addition need not wait for the one before it.
    Vec s[4] = {};
    const auto add = [&](int64_t j, int64_t n, Vec& into) ALWAYS_INLINE {
      Vec v = load<X>(x + j, n);
      if (kResidual) {
        // h is rounded to x's dtype before it is normalised: so what is normalised is what the next
        // layer reads as its residual and what the backward pass sees.
        const typename X::Packed packed = X::narrow(v + load<X>(residual + j, n));
        memcpy(h + j, &packed, size_t(n) * sizeof(T));
        v = X::widen(packed);
      }
      into += v;
    };
    int64_t j = 0;
    for (; j + 4 * kLanes <= cols; j += 4 * kLanes)
      for (int k = 0; k < 4; ++k) add(j + k * kLanes, kLanes, s[k]);
    for (; j + kLanes <= cols; j += kLanes) add(j, kLanes, s[0]);
    if (j < cols) add(j, cols - j, s[1]);
    const float mean = float(total(s) / double(cols));

    // The mean that is left after that one, and the squares, in a second pass.
    const T* from = kResidual ? h : x;
    float means[kLanes];
    for (float& m : means) m = mean;
    Vec d[4] = {}, q[4] = {};
    const auto centre = [&](int64_t j, int64_t n, int k) ALWAYS_INLINE {
      // Past the row's end is 0 - 0.
      const Vec v = load<X>(from + j, n) - load<F32>(means, n);
      d[k] += v;
      q[k] = fma(v, v, q[k]);
    };
    for (j = 0; j + 4 * kLanes <= cols; j += 4 * kLanes)
      for (int k = 0; k < 4; ++k) centre(j + k * kLanes, kLanes, k);
    for (; j + kLanes <= cols; j += kLanes) centre(j, kLanes, 0);
    if (j < cols) centre(j, cols - j, 1);
    // The row's scalars in double: they scale the whole row, so their errors would too.
    const double rest = total(d) / double(cols);
    const double variance = total(q) / double(cols) - rest * rest;
    const double positive = variance < 0 ? 0 : variance;  // NaN stays NaN
    const Row row = {mean, float(rest), float(1.0 / __builtin_sqrt(positive + a.eps))};
    memcpy(a.statistics + 3 * i, &row, sizeof row);
    return row;
  }

  static void rows(const LayerNormForward& a, int64_t begin, int64_t end) {
    const Parameter weight = {a.weight, a.weight_dtype, 1}, bias = {a.bias, a.bias_dtype, 0};
    for (int64_t i = begin; i < end; ++i) {
      const Row row = statistics(a, i);
      const T* h = kResidual ? row_of<X>(a.h, a.cols, i) : row_of<X>(a.x, a.x_stride, i);
      T* y = static_cast<T*>(a.y) + i * a.cols;
      each_vector(a.cols, [&](int64_t j, int64_t n) ALWAYS_INLINE {
        const Vec v = row.normalise(load<X>(h + j, n));
        store<X>(y + j, fma(v, weight.at(j, n), bias.at(j, n)), n);
      });
    }
  }
};

// With n = (h - mean) * rstd and g = dy * weight:  dx = rstd * (g - mean(g) - n * mean(g * n))
// (+ dh), dweight = sum over rows of dy * n, dbias = sum over rows of dy.
template <class X, bool kUpstream, bool kWeight, bool kBias>
struct Backward {
  using T = typename X::T;
  // Vectors in a cache line, as far as registers go.
  static constexpr int kLine = kLanes * sizeof(T) < 64 ? 2 : 1;
  static constexpr int64_t kShort = 1024;  // columns

  // mean(g) and mean(g * n).
  static void means(const LayerNormBackward& a, int64_t i, const Row& row, float& g_mean,
                    float& gn_mean) {
    const T* dy = row_of<X>(a.dy, a.dy_stride, i);
    const T* h = row_of<X>(a.h, a.h_stride, i);
    const Parameter weight = {a.weight, a.weight_dtype, 1};
    const int64_t cols = a.cols;
    Vec s[4] = {}, p[4] = {};
    const auto add = [&](int64_t j, int64_t n, int k) ALWAYS_INLINE {
      const Vec g = load<X>(dy + j, n) * weight.at(j, n);
      s[k] += g;
      p[k] = fma(g, load<X>(h + j, n) - row.mean, p[k]);
    };
    int64_t j = 0;
    for (; j + 4 * kLanes <= cols; j += 4 * kLanes)
      for (int k = 0; k < 4; ++k) add(j + k * kLanes, kLanes, k);
    for (; j + kLanes <= cols; j += kLanes) add(j, kLanes, 0);
    if (j < cols) add(j, cols - j, 1);
    const double g_total = total(s);
    g_mean = float(g_total / double(cols));
    gn_mean = float(row.rstd * (total(p) - row.rest * g_total) / double(cols));
  }

  // kRows rows at a time: their terms of the sums are added up in registers, so that the partial
  // sums are read and written once for all of them, and fewer additions follow one another.
  template <int kRows>
  static void some(const LayerNormBackward& a, int64_t i, float* weight_sum, float* bias_sum) {
    Row row[kRows];
    const T *dy[kRows], *dh[kRows], *h[kRows];
    T* dx[kRows] = {};
    float g_mean[kRows] = {}, gn_mean[kRows] = {};
    const bool need_dx = a.dx;
    for (int r = 0; r < kRows; ++r) {
      memcpy(&row[r], a.statistics + 3 * (i + r), sizeof(Row));
      dy[r] = row_of<X>(a.dy, a.dy_stride, i + r);
      dh[r] = kUpstream ? row_of<X>(a.dh, a.dh_stride, i + r) : nullptr;
      h[r] = row_of<X>(a.h, a.h_stride, i + r);
      if (need_dx) {
        dx[r] = static_cast<T*>(a.dx) + (i + r) * a.cols;
        means(a, i + r, row[r], g_mean[r], gn_mean[r]);
      }
    }
    const Parameter weight = {a.weight, a.weight_dtype, 1};
    // `vectors` of each row at a time, kLine of them where that is possible: rows are often a power
    // of two apart, so that their lines compete for the same few places of the L1 cache.
    const auto gradients = [&](int64_t j, int64_t n, int vectors) ALWAYS_INLINE {
      // The rows in two sums each, for a chain of four rounds more than torch's sums do.
      Vec w[kLine], weight_total[kLine][2] = {}, bias_total[kLine][2] = {};
      for (int k = 0; k < vectors; ++k) w[k] = weight.at(j + k * kLanes, n);
      for (int r = 0; r < kRows; ++r)
        for (int k = 0; k < vectors; ++k) {
          const int64_t at = j + k * kLanes;
          const Vec d = load<X>(dy[r] + at, n);
          const Vec v = row[r].normalise(load<X>(h[r] + at, n));
          if (need_dx) {
            Vec out = fma(v, splat(-gn_mean[r]), d * w[k] - g_mean[r]) * row[r].rstd;
            if (kUpstream) out += load<X>(dh[r] + at, n);
            store<X>(dx[r] + at, out, n);
          }
          if (kWeight) weight_total[k][r % 2] = fma(d, v, weight_total[k][r % 2]);
          if (kBias) bias_total[k][r % 2] += d;
        }
      for (int k = 0; k < vectors; ++k) {
        const int64_t at = j + k * kLanes;
        if (kWeight) add(weight_sum + at, weight_total[k][0] + weight_total[k][1], n);
        if (kBias) add(bias_sum + at, bias_total[k][0] + bias_total[k][1], n);
      }
    };
    int64_t j = 0;
    for (; j + kLine * kLanes <= a.cols; j += kLine * kLanes) gradients(j, kLanes, kLine);
    for (; j + kLanes <= a.cols; j += kLanes) gradients(j, kLanes, 1);
    if (j < a.cols) gradients(j, a.cols - j, 1);
  }

  static void blocks(const LayerNormBackward& a, int64_t begin, int64_t end) {
    const int64_t size = block_rows(a.rows);
    for (int64_t block = begin; block < end; ++block) {
      float* weight_sum = kWeight ? a.partial_weight + block * a.cols : nullptr;
      float* bias_sum = kBias ? a.partial_bias + block * a.cols : nullptr;
      if (kWeight) memset(weight_sum, 0, size_t(a.cols) * sizeof(float));
      if (kBias) memset(bias_sum, 0, size_t(a.cols) * sizeof(float));
      int64_t i = block * size;
      const int64_t past = i + size < a.rows ? i + size : a.rows;
      // Short rows stay in the L1 cache with the partial sums, and one at a time is faster.
      if (a.cols > kShort) {
        for (; i + 4 <= past; i += 4) some<4>(a, i, weight_sum, bias_sum);
        for (; i + 2 <= past; i += 2) some<2>(a, i, weight_sum, bias_sum);
      }
      for (; i < past; ++i) some<1>(a, i, weight_sum, bias_sum);
    }
  }
};

template <class X>
void forward_typed(const LayerNormForward& a, int64_t begin, int64_t end) {
  if (a.residual)
    Forward<X, true>::rows(a, begin, end);
  else
    Forward<X, false>::rows(a, begin, end);
}

template <class X, bool kUpstream>
void backward_sums(const LayerNormBackward& a, int64_t begin, int64_t end) {
  if (a.partial_weight && a.partial_bias)
    Backward<X, kUpstream, true, true>::blocks(a, begin, end);
  else if (a.partial_weight)
    Backward<X, kUpstream, true, false>::blocks(a, begin, end);
  else if (a.partial_bias)
    Backward<X, kUpstream, false, true>::blocks(a, begin, end);
  else
    Backward<X, kUpstream, false, false>::blocks(a, begin, end);
}

template <class X>
void backward_typed(const LayerNormBackward& a, int64_t begin, int64_t end) {
  if (a.dh)
    backward_sums<X, true>(a, begin, end);
  else
    backward_sums<X, false>(a, begin, end);
}

void forward(const LayerNormForward& a, int x_dtype, int64_t begin, int64_t end) {
  if (x_dtype == kFloat32)
    forward_typed<F32>(a, begin, end);
  else if (x_dtype == kBFloat16)
    forward_typed<BF16>(a, begin, end);
  else
    forward_typed<F16>(a, begin, end);
}

void backward(const LayerNormBackward& a, int x_dtype, int64_t begin, int64_t end) {
  if (x_dtype == kFloat32)
    backward_typed<F32>(a, begin, end);
  else if (x_dtype == kBFloat16)
    backward_typed<BF16>(a, begin, end);
  else
    backward_typed<F16>(a, begin, end);
}

void sums(const LayerNormBackward& a, int64_t begin, int64_t end) {
  const int64_t blocks = block_count(a.rows);
  if (a.partial_weight)
    sum_blocks(a.partial_weight, blocks, a.cols, a.dweight, a.weight_dtype, begin, end);
  if (a.partial_bias)
    sum_blocks(a.partial_bias, blocks, a.cols, a.dbias, a.bias_dtype, begin, end);
}

}  // namespace

const LayerNormKernels AT_LEVEL(layer_norm) = {forward, backward, sums};
