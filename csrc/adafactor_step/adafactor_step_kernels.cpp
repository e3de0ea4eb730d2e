// levels: portable avx2 avx512 avx512bf16
// Instantiated for tensors all in float32, and for dtypes that are asked for at each vector
// (common/elements.h).
#include "adafactor_step/adafactor_step.h"
#include "common/elements.h"
#include "common/level.h"

namespace {

// Sums stay in float lanes for at most so many rows or vectors, then they go on in doubles.
constexpr int64_t kFloatRows = 64;
constexpr int64_t kFloatVectors = 256;

inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }

// Sums of squares of two things side by side.
struct Sums {
  Vec update{}, weight{};
  int64_t vectors = 0;
  FactorSquares total{};

  ALWAYS_INLINE void add(Vec u, Vec x) {
    update = fma(u, u, update);
    weight = fma(x, x, weight);
  }
  ALWAYS_INLINE void row(int64_t size) {
    vectors += size / kLanes + 1;
    if (vectors >= kFloatVectors) flush();
  }
  void flush() {
    total.update += double(sum(update));
    total.weight += double(sum(weight));
    update = weight = Vec{};
    vectors = 0;
  }
};

template <bool kAllFloat32>
struct Access {
  const FactorTensor& t;
  const Vec scale;
  const int param_dtype = kAllFloat32 ? int(kFloat32) : t.param_dtype;
  const int grad_dtype = kAllFloat32 ? int(kFloat32) : t.grad_dtype;

  ALWAYS_INLINE Vec grad(int64_t j, int64_t n) const {
    return load_any(t.grad, grad_dtype, j, n) * scale;
  }
  ALWAYS_INLINE Vec weight(int64_t j, int64_t n) const {
    if (!kAllFloat32 && t.master) return load<F32>(t.master + j, n);
    const Vec x = load_any(t.param, param_dtype, j, n);
    return !kAllFloat32 && t.compensation ? x + load<BF16>(t.compensation + j, n) : x;
  }
  ALWAYS_INLINE void set_weight(int64_t j, Vec x, int64_t n) const {
    if (!kAllFloat32 && t.master) store<F32>(t.master + j, x, n);
    store_any(t.param, param_dtype, j, x, n);
    if (!kAllFloat32 && t.compensation)
      store<BF16>(t.compensation + j, x - load_any(t.param, param_dtype, j, n), n);
  }
  void zero_grad(int64_t j, int64_t count) const {
    const int64_t width = grad_dtype == kFloat32 ? 4 : 2;
    memset(static_cast<char*>(t.grad) + j * width, 0, size_t(count * width));
  }
};

// Offset of the block's element in row `row` of its matrix and its first column.
inline int64_t offset(const FactorTensor& t, const FactorBlock& b, int64_t row) {
  return (b.matrix * t.rows + row) * t.cols + b.col_begin;
}

// Rows at a time: a column's sum is loaded and stored once for so many elements.
template <int kRows, bool kAllFloat32>
ALWAYS_INLINE inline void sum_rows(const Access<kAllFloat32>& a, int64_t at, int64_t size,
                                   float* columns, double* rows, int64_t stride) {
  Vec of_row[kRows] = {};
  each_vector(size, [&](int64_t j, int64_t n) ALWAYS_INLINE {
    Vec column = load<F32>(columns + j);
    for (int i = 0; i < kRows; ++i) {
      const Vec g = a.grad(at + i * a.t.cols + j, n);
      column = fma(g, g, column);
      of_row[i] = fma(g, g, of_row[i]);
    }
    store<F32>(columns + j, column);
  });
  for (int i = 0; i < kRows; ++i) rows[i * stride] = double(sum(of_row[i]));
}

template <bool kAllFloat32>
void sums_of(const FactorTensor& t, const FactorOptions& o, const FactorBlock& b, double* rows,
             int64_t stride, double* cols) {
  const Access<kAllFloat32> a{t, splat(o.scale)};
  const int64_t size = b.col_end - b.col_begin;
  float columns[kFactorCols + kLanes];
  for (int64_t begin = b.row_begin; begin < b.row_end; begin += kFloatRows) {
    const int64_t end = begin + kFloatRows < b.row_end ? begin + kFloatRows : b.row_end;
    for (int64_t j = 0; j < size; j += kLanes) store<F32>(columns + j, Vec{});
    int64_t row = begin;
    for (; row + 4 <= end; row += 4, rows += 4 * stride)
      sum_rows<4>(a, offset(t, b, row), size, columns, rows, stride);
    for (; row < end; ++row, rows += stride)
      sum_rows<1>(a, offset(t, b, row), size, columns, rows, stride);
    if (begin == b.row_begin)
      for (int64_t j = 0; j < size; ++j) cols[j] = double(columns[j]);
    else
      for (int64_t j = 0; j < size; ++j) cols[j] += double(columns[j]);
  }
}

void move(float* factors, const double* sums, int64_t size, double count, double new_share) {
  for (int64_t j = 0; j < size; ++j) {
    const double old = double(factors[j]);
    factors[j] = float(old + new_share * (sums[j] / count - old));
  }
}

void inverse_roots(const float* factors, int64_t size, double numerator, float* to) {
  const Vec above = splat(float(numerator));
  each_vector(size, [&](int64_t j, int64_t n) ALWAYS_INLINE {
    store<F32>(to + j, above / square_root(load<F32>(factors + j, n)), n);
  });
}

// The limit of 1 / sqrt(second moment): finite, so that a gradient of 0 never moves a weight.
inline Vec limit(const FactorTensor& t) {
  const double inverse = 1 / t.eps1;
  return splat(inverse < 0x1p127 ? float(inverse) : 0x1p127f);
}

template <bool kAllFloat32>
FactorSquares squares_of(const FactorTensor& t, const FactorOptions& o, const FactorBlock& b,
                         const float* rows, const float* cols) {
  const Access<kAllFloat32> a{t, splat(o.scale)};
  const Vec most = limit(t), share = splat(float(t.new_share));
  const int64_t size = b.col_end - b.col_begin;
  Sums sums;
  for (int64_t row = b.row_begin; row < b.row_end; ++row) {
    const int64_t at = offset(t, b, row);
    if (cols) {
      const Vec factor = splat(*rows++);
      each_vector(size, [&](int64_t j, int64_t n) ALWAYS_INLINE {
        const Vec g = a.grad(at + j, n), x = a.weight(at + j, n);
        sums.add(g * smaller(factor * load<F32>(cols + j, n), most), x);
      });
      sums.row(size);
    } else {
      for (int64_t from = 0; from < size; from += kFloatVectors * kLanes) {
        const int64_t left = size - from;
        const int64_t count = left < kFloatVectors * kLanes ? left : kFloatVectors * kLanes;
        each_vector(count, [&](int64_t j, int64_t n) ALWAYS_INLINE {
          const int64_t k = at + from + j;
          const Vec g = a.grad(k, n), x = a.weight(k, n);
          Vec v = load<F32>(t.row_var + k, n);
          v = fma(share, fma(g, g, -v), v);
          store<F32>(t.row_var + k, v, n);
          sums.add(g * smaller(1.0f / square_root(v), most), x);
        });
        sums.row(count);
      }
    }
  }
  sums.flush();
  return sums.total;
}

template <bool kAllFloat32>
void apply_to(const FactorTensor& t, const FactorOptions& o, const FactorBlock& b,
              const float* rows, const float* cols, float step) {
  const Access<kAllFloat32> a{t, splat(o.scale)};
  const Vec most = limit(t), decay = splat(t.decay), rate = splat(step);
  const Vec threshold = splat(t.threshold);
  const int64_t size = b.col_end - b.col_begin;
  const bool shrinks = t.threshold != 0;
  for (int64_t row = b.row_begin; row < b.row_end; ++row) {
    const int64_t at = offset(t, b, row);
    const Vec factor = splat(cols ? *rows++ : 0.0f);
    each_vector(size, [&](int64_t j, int64_t n) ALWAYS_INLINE {
      const Vec inverse = cols ? factor * load<F32>(cols + j, n)
                               : 1.0f / square_root(load<F32>(t.row_var + at + j, n));
      const Vec update = a.grad(at + j, n) * smaller(inverse, most);
      Vec x = a.weight(at + j, n);
      x = fma(-rate, update, fma(-decay, x, x));
      if (shrinks) x = shrink(x, threshold);
      a.set_weight(at + j, x, n);
    });
    if (o.zero_grad) a.zero_grad(at, size);
  }
}

inline bool all_float32(const FactorTensor& t) {
  return t.param_dtype == kFloat32 && t.grad_dtype == kFloat32;
}

void sums(const FactorTensor& t, const FactorOptions& o, const FactorBlock& b, double* rows,
          int64_t stride, double* cols) {
  (all_float32(t) ? sums_of<true> : sums_of<false>)(t, o, b, rows, stride, cols);
}

FactorSquares squares(const FactorTensor& t, const FactorOptions& o, const FactorBlock& b,
                      const float* rows, const float* cols) {
  return (all_float32(t) ? squares_of<true> : squares_of<false>)(t, o, b, rows, cols);
}

void apply(const FactorTensor& t, const FactorOptions& o, const FactorBlock& b, const float* rows,
           const float* cols, float step) {
  (all_float32(t) ? apply_to<true> : apply_to<false>)(t, o, b, rows, cols, step);
}

constexpr AdafactorKernels kAdafactorKernels = {sums, move, inverse_roots, squares, apply};

}  // namespace

const AdafactorKernels AT_LEVEL(adafactor) = kAdafactorKernels;
