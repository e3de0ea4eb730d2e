// levels: portable avx2 avx512 avx512bf16
// A row is one position, whose angles all heads share: they are widened once, signs and all, to
// stay in the L1 cache. Then the heads follow one another, as they do in memory (keeping the angles
// in registers and rotating a vector of every head had a quarter of that rate).
#include "common/elements.h"
#include "common/level.h"
#include "rope/rope.h"

namespace {

constexpr int kAngles = 512;  // columns of cos and sin at a time, a multiple of any kLanes

struct Angles {
  float cos[kAngles], sin[kAngles];
};

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

inline const void* at_row(const Rope& a, const RopeTable& table, int64_t batch, int64_t row) {
  const int64_t offset = batch * table.batch + row * table.row;
  return static_cast<const char*>(table.data) + offset * (a.table_dtype == kFloat32 ? 4 : 2);
}

// Pairs from the two halves, (u, v) -> (u * cos_a + v * sin_a, v * cos_b + u * sin_b). The angles
// are those of the first elements and then, kStep further on, those of the second.
template <class X>
struct Halves {
  using T = typename X::T;
  static constexpr int kStep = kAngles / 2;
  static int64_t columns(const Rope& a) { return a.rotated / 2; }

  static void prepare(const Rope& a, const void* cos, const void* sin, int64_t first, int64_t count,
                      Angles& angles) {
    const int64_t second = a.rotated / 2 + first;
    each_vector(count, [&](int64_t j, int64_t n) ALWAYS_INLINE {
      const Vec sin_a = load_any(sin, a.table_dtype, first + j, n);
      const Vec sin_b = load_any(sin, a.table_dtype, second + j, n);
      store<F32>(angles.cos + j, load_any(cos, a.table_dtype, first + j, n));
      store<F32>(angles.cos + kStep + j, load_any(cos, a.table_dtype, second + j, n));
      store<F32>(angles.sin + j, a.transposed ? sin_b : -sin_a);
      store<F32>(angles.sin + kStep + j, a.transposed ? -sin_a : sin_b);
    });
  }

  static void rotate(const Rope& a, const Angles& angles, const T* x, T* y, int64_t count) {
    const int64_t half = a.rotated / 2;
    each_vector(count, [&](int64_t j, int64_t n) ALWAYS_INLINE {
      const Vec cos_a = load<F32>(angles.cos + j), cos_b = load<F32>(angles.cos + kStep + j);
      const Vec sin_a = load<F32>(angles.sin + j), sin_b = load<F32>(angles.sin + kStep + j);
      const Vec u = load<X>(x + j, n), v = load<X>(x + half + j, n);
      store<X>(y + j, fma(v, sin_a, u * cos_a), n);
      store<X>(y + half + j, fma(u, sin_b, v * cos_b), n);
    });
  }
};

// Pairs of neighbours: each element times its cos, plus its neighbour times its sin.
template <class X>
struct Neighbours {
  using T = typename X::T;
  static constexpr int kStep = kAngles;
  static int64_t columns(const Rope& a) { return a.rotated; }

  static void prepare(const Rope& a, const void* cos, const void* sin, int64_t first, int64_t count,
                      Angles& angles) {
    each_vector(count, [&](int64_t j, int64_t n) ALWAYS_INLINE {
      const Vec s = load_any(sin, a.table_dtype, first + j, n);
      store<F32>(angles.cos + j, load_any(cos, a.table_dtype, first + j, n));
      store<F32>(angles.sin + j, a.transposed ? alternated(swapped(s), 1) : alternated(s, 0));
    });
  }

  static void rotate(const Rope&, const Angles& angles, const T* x, T* y, int64_t count) {
    each_vector(count, [&](int64_t j, int64_t n) ALWAYS_INLINE {
      const Vec cos = load<F32>(angles.cos + j), sin = load<F32>(angles.sin + j);
      const Vec v = load<X>(x + j, n);
      store<X>(y + j, fma(swapped(v), sin, v * cos), n);
    });
  }
};

template <class X, class Pairs>
void rotate_rows(const Rope& a, int64_t begin, int64_t end) {
  using T = typename X::T;
  const int64_t columns = Pairs::columns(a);
  const size_t rest = size_t(a.size - a.rotated) * sizeof(T);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / a.length, row = i % a.length;
    const void *cos = at_row(a, a.cos, batch, row), *sin = at_row(a, a.sin, batch, row);
    for (int64_t first = 0; first < columns; first += Pairs::kStep) {
      const int64_t count = columns - first < Pairs::kStep ? columns - first : Pairs::kStep;
      Angles angles;
      Pairs::prepare(a, cos, sin, first, count, angles);
      for (int t = 0; t < a.count; ++t) {
        const RopeTensor& tensor = a.tensors[t];
        const T* x = static_cast<const T*>(tensor.x) + batch * tensor.x_batch + row * tensor.x_row;
        T* y = static_cast<T*>(tensor.y) + i * tensor.heads * a.size;
        for (int64_t head = 0; head < tensor.heads; ++head, x += tensor.x_head, y += a.size) {
          Pairs::rotate(a, angles, x + first, y + first, count);
          if (rest && first == 0) memcpy(y + a.rotated, x + a.rotated, rest);
        }
      }
    }
  }
}

template <class X>
void rotate_typed(const Rope& a, int64_t begin, int64_t end) {
  if (a.interleaved)
    rotate_rows<X, Neighbours<X>>(a, begin, end);
  else
    rotate_rows<X, Halves<X>>(a, begin, end);
}

void rotate(const Rope& a, int dtype, int64_t begin, int64_t end) {
  if (dtype == kFloat32)
    rotate_typed<F32>(a, begin, end);
  else if (dtype == kBFloat16)
    rotate_typed<BF16>(a, begin, end);
  else
    rotate_typed<F16>(a, begin, end);
}

}  // namespace

const RopeKernels AT_LEVEL(rope) = {rotate};
