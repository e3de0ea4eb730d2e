// levels: portable avx2 avx512 avx512bf16
// A row is read from memory once; its second pass finds it in the L1 or L2 cache.
#include "common/column_sums.h"
#include "common/level.h"
#include "rms_norm/rms_norm.h"

namespace {

template <class X, class W, bool kResidual>
struct Forward {
  using T = typename X::T;

  static void row(const RmsNormForward& a, int64_t i) {
    const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
    const T* residual = kResidual ? static_cast<const T*>(a.residual) + i * a.residual_stride : x;
    T* h = kResidual ? static_cast<T*>(a.h) + i * a.cols : nullptr;
    T* y = static_cast<T*>(a.y) + i * a.cols;
    const typename W::T* weight = static_cast<const typename W::T*>(a.weight);
    const int64_t cols = a.cols;
    const float offset = a.offset;

    const auto square = [&](int64_t j, int64_t n, Vec into) ALWAYS_INLINE {
      Vec v = load<X>(x + j, n);
      if (kResidual) {
        // h is rounded to x's dtype before it is normalised: so what is normalised is what the next
        // layer reads as its residual and what the backward pass sees.
        const typename X::Packed packed = X::narrow(v + load<X>(residual + j, n));
        memcpy(h + j, &packed, size_t(n) * sizeof(T));
        v = X::widen(packed);
      }
      return fma(v, v, into);
    };
    // Four sums, so that one addition need not wait for the one before it.
    Vec s[4] = {};
    int64_t j = 0;
    for (; j + 4 * kLanes <= cols; j += 4 * kLanes)
      for (int k = 0; k < 4; ++k) s[k] = square(j + k * kLanes, kLanes, s[k]);
    for (; j + kLanes <= cols; j += kLanes) s[0] = square(j, kLanes, s[0]);
    if (j < cols) s[1] = square(j, cols - j, s[1]);
    // The row's scalar in double: it scales the whole row, so its error would too.
    const double total = sum((s[0] + s[1]) + (s[2] + s[3]));
    const float rstd = float(1.0 / __builtin_sqrt(total / double(cols) + a.eps));
    a.rstd[i] = rstd;

    const T* from = kResidual ? h : x;
    const auto normalize = [&](int64_t j, int64_t n, Vec w) ALWAYS_INLINE {
      store<X>(y + j, load<X>(from + j, n) * rstd * w, n);
    };
    if (offset == 0)  // an addition less, which rows in the cache notice
      each_vector(cols, [&](int64_t j, int64_t n) ALWAYS_INLINE {
        normalize(j, n, load<W>(weight + j, n));
      });
    else
      each_vector(cols, [&](int64_t j, int64_t n) ALWAYS_INLINE {
        normalize(j, n, load<W>(weight + j, n) + offset);
      });
  }

  static void rows(const RmsNormForward& a, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row(a, i);
  }
};

// With g = dy * (offset + weight) and c = rstd^3 * mean(g * h):  dx = g * rstd - h * c (+ dh),
// dweight = sum over rows of dy * h * rstd.
template <class X, class W, bool kUpstream, bool kWeight>
struct Backward {
  using T = typename X::T;

  static const T* row_of(const void* base, int64_t stride, int64_t i) {
    return static_cast<const T*>(base) + i * stride;
  }

  template <bool kOffset>
  static float coefficient(const RmsNormBackward& a, int64_t i) {
    const T *dy = row_of(a.dy, a.dy_stride, i), *h = row_of(a.h, a.h_stride, i);
    const typename W::T* weight = static_cast<const typename W::T*>(a.weight);
    const int64_t cols = a.cols;
    const float offset = a.offset;
    const auto product = [&](int64_t j, int64_t n, Vec into) ALWAYS_INLINE {
      const Vec w = kOffset ? load<W>(weight + j, n) + offset : load<W>(weight + j, n);
      return fma(load<X>(dy + j, n) * w, load<X>(h + j, n), into);
    };
    Vec s[4] = {};
    int64_t j = 0;
    for (; j + 4 * kLanes <= cols; j += 4 * kLanes)
      for (int k = 0; k < 4; ++k) s[k] = product(j + k * kLanes, kLanes, s[k]);
    for (; j + kLanes <= cols; j += kLanes) s[0] = product(j, kLanes, s[0]);
    if (j < cols) s[1] = product(j, cols - j, s[1]);
    const double dot = sum((s[0] + s[1]) + (s[2] + s[3]));
    const double rstd = a.rstd[i];
    return float(rstd * rstd * rstd * (dot / double(cols)));
  }

  // kRows rows at a time: their terms of dweight are added up in registers, so that `partial` is
  // read and written once for all of them, and fewer additions follow one another.
  template <int kRows>
  static void rows(const RmsNormBackward& a, int64_t i, float* partial) {
    const T *dy[kRows], *dh[kRows], *h[kRows];
    T* dx[kRows];
    float c[kRows];
    for (int r = 0; r < kRows; ++r) {
      dy[r] = row_of(a.dy, a.dy_stride, i + r);
      dh[r] = kUpstream ? row_of(a.dh, a.dh_stride, i + r) : nullptr;
      h[r] = row_of(a.h, a.h_stride, i + r);
      dx[r] = static_cast<T*>(a.dx) + (i + r) * a.cols;
      c[r] = a.offset == 0 ? coefficient<false>(a, i + r) : coefficient<true>(a, i + r);
    }
    const typename W::T* weight = static_cast<const typename W::T*>(a.weight);
    const int64_t cols = a.cols;
    const float offset = a.offset;
    const auto gradients = [&](int64_t j, int64_t n) ALWAYS_INLINE {
      const Vec w = load<W>(weight + j, n) + offset;
      Vec total = {};
      for (int r = 0; r < kRows; ++r) {
        const Vec d = load<X>(dy[r] + j, n) * a.rstd[i + r], v = load<X>(h[r] + j, n);
        Vec out = fma(d, w, v * -c[r]);
        if (kUpstream) out += load<X>(dh[r] + j, n);
        store<X>(dx[r] + j, out, n);
        if (kWeight) total = fma(d, v, total);
      }
      if (kWeight) store<F32>(partial + j, load<F32>(partial + j, n) + total, n);
    };
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) gradients(j, kLanes);
    if (j < cols) gradients(j, cols - j);
  }

  static void blocks(const RmsNormBackward& a, int64_t begin, int64_t end) {
    const int64_t size = block_rows(a.rows);
    for (int64_t block = begin; block < end; ++block) {
      float* partial = kWeight ? a.partial + block * a.cols : nullptr;
      if (kWeight) memset(partial, 0, size_t(a.cols) * sizeof(float));
      int64_t i = block * size;
      const int64_t past = i + size < a.rows ? i + size : a.rows;
      for (; i + 4 <= past; i += 4) rows<4>(a, i, partial);
      for (; i < past; ++i) rows<1>(a, i, partial);
    }
  }
};

template <class X, class W>
void forward_typed(const RmsNormForward& a, int64_t begin, int64_t end) {
  if (a.residual)
    Forward<X, W, true>::rows(a, begin, end);
  else
    Forward<X, W, false>::rows(a, begin, end);
}

template <class X, class W>
void backward_typed(const RmsNormBackward& a, int64_t begin, int64_t end) {
  if (a.dh && a.partial)
    Backward<X, W, true, true>::blocks(a, begin, end);
  else if (a.dh)
    Backward<X, W, true, false>::blocks(a, begin, end);
  else if (a.partial)
    Backward<X, W, false, true>::blocks(a, begin, end);
  else
    Backward<X, W, false, false>::blocks(a, begin, end);
}

template <class X>
void forward_weight(const RmsNormForward& a, int weight_dtype, int64_t begin, int64_t end) {
  if (weight_dtype == kFloat32)
    forward_typed<X, F32>(a, begin, end);
  else if (weight_dtype == kBFloat16)
    forward_typed<X, BF16>(a, begin, end);
  else
    forward_typed<X, F16>(a, begin, end);
}

template <class X>
void backward_weight(const RmsNormBackward& a, int weight_dtype, int64_t begin, int64_t end) {
  if (weight_dtype == kFloat32)
    backward_typed<X, F32>(a, begin, end);
  else if (weight_dtype == kBFloat16)
    backward_typed<X, BF16>(a, begin, end);
  else
    backward_typed<X, F16>(a, begin, end);
}

void forward(const RmsNormForward& a, int x_dtype, int weight_dtype, int64_t begin, int64_t end) {
  if (x_dtype == kFloat32)
    forward_weight<F32>(a, weight_dtype, begin, end);
  else if (x_dtype == kBFloat16)
    forward_weight<BF16>(a, weight_dtype, begin, end);
  else
    forward_weight<F16>(a, weight_dtype, begin, end);
}

void backward(const RmsNormBackward& a, int x_dtype, int weight_dtype, int64_t begin,
              int64_t end) {
  if (x_dtype == kFloat32)
    backward_weight<F32>(a, weight_dtype, begin, end);
  else if (x_dtype == kBFloat16)
    backward_weight<BF16>(a, weight_dtype, begin, end);
  else
    backward_weight<F16>(a, weight_dtype, begin, end);
}

void dweight(const RmsNormBackward& a, int weight_dtype, int64_t begin, int64_t end) {
  sum_blocks(a.partial, block_count(a.rows), a.cols, a.dweight, weight_dtype, begin, end);
}

}  // namespace

const RmsNormKernels AT_LEVEL(rms_norm) = {forward, backward, dweight};
