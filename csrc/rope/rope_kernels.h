// The kernel bodies. Included once by rope_{portable,avx2,avx512,avx512bf16}.cpp, each compiled
// with its own flags. A row is one position: all heads of all tensors share its angles, so a vector
// of them is prepared once, signs and all, and every head takes it from registers.
#pragma once

#include "common/elements.h"
#include "rope/rope.h"

namespace {

// Neighbours exchanged.
inline Vec swapped(Vec v) {
  typedef uint64_t Pairs __attribute__((vector_size(4 * kLanes)));
  const Pairs p = (Pairs)v;
  return (Vec)((p << 32) | (p >> 32));
}

// The sign of every second lane changed, from lane `first` on.
ALWAYS_INLINE inline Vec alternated(Vec v, int first) {
  Bits signs = {};
  for (int i = first; i < kLanes; i += 2) signs[i] = 0x80000000u;
  return (Vec)((Bits)v ^ signs);
}

template <class X>
struct Rotation {
  using T = typename X::T;

  // f(x, y) for every head of every tensor at one position.
  template <class F>
  ALWAYS_INLINE static void each_head(const Rope& a, int64_t batch, int64_t row, F&& f) {
    for (int t = 0; t < a.count; ++t) {
      const RopeTensor& tensor = a.tensors[t];
      const T* x = static_cast<const T*>(tensor.x) + batch * tensor.x_batch + row * tensor.x_row;
      T* y = static_cast<T*>(tensor.y) + (batch * a.length + row) * tensor.heads * a.size;
      for (int64_t head = 0; head < tensor.heads; ++head, x += tensor.x_head, y += a.size) f(x, y);
    }
  }

  static const void* table_row(const Rope& a, const RopeTable& table, int64_t batch, int64_t row) {
    const int64_t offset = batch * table.batch + row * table.row;
    return static_cast<const char*>(table.data) + offset * (a.table_dtype == kFloat32 ? 4 : 2);
  }

  static void halves(const Rope& a, int64_t batch, int64_t row) {
    const void *cos = table_row(a, a.cos, batch, row), *sin = table_row(a, a.sin, batch, row);
    const int64_t half = a.rotated / 2;
    each_vector(half, [&](int64_t j, int64_t n) ALWAYS_INLINE {
      const Vec cos_a = load_any(cos, a.table_dtype, j, n);
      const Vec cos_b = load_any(cos, a.table_dtype, half + j, n);
      Vec sin_a = -load_any(sin, a.table_dtype, j, n);
      Vec sin_b = load_any(sin, a.table_dtype, half + j, n);
      if (a.transposed) {
        const Vec kept = sin_a;
        sin_a = sin_b;
        sin_b = kept;
      }
      each_head(a, batch, row, [&](const T* x, T* y) ALWAYS_INLINE {
        const Vec u = load<X>(x + j, n), v = load<X>(x + half + j, n);
        store<X>(y + j, fma(v, sin_a, u * cos_a), n);
        store<X>(y + half + j, fma(u, sin_b, v * cos_b), n);
      });
    });
  }

  static void neighbours(const Rope& a, int64_t batch, int64_t row) {
    const void *cos = table_row(a, a.cos, batch, row), *sin = table_row(a, a.sin, batch, row);
    each_vector(a.rotated, [&](int64_t j, int64_t n) ALWAYS_INLINE {
      const Vec c = load_any(cos, a.table_dtype, j, n), s = load_any(sin, a.table_dtype, j, n);
      const Vec signed_sin = a.transposed ? alternated(swapped(s), 1) : alternated(s, 0);
      each_head(a, batch, row, [&](const T* x, T* y) ALWAYS_INLINE {
        const Vec v = load<X>(x + j, n);
        store<X>(y + j, fma(swapped(v), signed_sin, v * c), n);
      });
    });
  }

  static void rows(const Rope& a, int64_t begin, int64_t end) {
    const size_t rest = size_t(a.size - a.rotated) * sizeof(T);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / a.length, row = i % a.length;
      if (a.interleaved)
        neighbours(a, batch, row);
      else
        halves(a, batch, row);
      if (rest)
        each_head(a, batch, row,
                  [&](const T* x, T* y) { memcpy(y + a.rotated, x + a.rotated, rest); });
    }
  }
};

void rotate(const Rope& a, int dtype, int64_t begin, int64_t end) {
  if (dtype == kFloat32)
    Rotation<F32>::rows(a, begin, end);
  else if (dtype == kBFloat16)
    Rotation<BF16>::rows(a, begin, end);
  else
    Rotation<F16>::rows(a, begin, end);
}

}  // namespace
