// levels: portable avx2 avx512 avx512bf16 amx
#include "common/level.h"
#include "common/packing.h"
#include "linear/linear.h"

namespace {

template <class Engine, class X>
struct LinearOf {
  using P = LinearProduct;
  using T = typename X::T;
  static constexpr bool kFloats = Engine::kPair == 1;
  // Words in a piece. Bfloat16's are an odd number of cache lines, so that a tile's rows do not
  // meet in one set of the L1 cache.
  static constexpr int64_t kDepth = kFloats ? Engine::kDepthMost : 784;
  static constexpr int64_t kPanel = ::kPanel<Engine>, kGroup = P::kGroup;
  static constexpr int64_t kSums = kGroup + 16;  // an odd number of cache lines from row to row
  static constexpr int64_t kPiece = kDepth * Engine::kPair;  // elements
  // Of the tiles: what two of them down and across load stays in the L1 cache.
  static constexpr int64_t kStep = Engine::kTiles ? 128 : kDepth;

  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t panels(const P& p) { return (p.columns + kPanel - 1) / kPanel; }
  static int64_t words(int64_t elements) {
    return round_up((elements + Engine::kPair - 1) / Engine::kPair, 16);
  }
  static const T* at(const void* x, int64_t element) {
    return static_cast<const T*>(x) + element;
  }
  // The packed panel at `depth`, which begins a piece of `piece` words.
  static int64_t panel_at(const P& p, int64_t depth, int64_t piece, int64_t panel) {
    return (depth / Engine::kPair * panels(p) + panel * piece) * kPanel;
  }

  // Where b is long, all tasks go through one group of its columns before the next: a group stays
  // in the cache that the cores share. Tiles are too fast for rows that are packed once a group.
  static LinearSizes sizes(const P& p) {
    return {4 * words(p.depth) * panels(p) * kPanel, 4 * P::kRows * kDepth, 4 * P::kRows * kSums,
            kFloats ? kGroup : round_up(p.columns, kGroup)};
  }

  static void pack(const P& p, int64_t column, void* packed) {
    const int64_t last = least(column + P::kPacked, p.columns);
    for (int64_t k = 0; k < p.depth; k += kPiece) {
      const int64_t left = least(p.depth - k, kPiece), piece = words(left);
      for (int64_t j = column; j < last; j += kPanel) {
        uint32_t* const to = static_cast<uint32_t*>(packed) + panel_at(p, k, piece, j / kPanel);
        if (p.b_transposed)
          pack_turned<Engine, X>(at(p.b, j * p.b_stride + k), p.b_stride, p.columns - j, left,
                                 kPanel, piece, to, kPanel);
        else
          pack_paired<Engine, X>(at(p.b, k * p.b_stride + j), p.b_stride, left, p.columns - j,
                                 piece, kPanel, to);
      }
    }
  }

  static void pack_piece(const P& p, int64_t begin, int64_t rows, int64_t k, int64_t left,
                         uint32_t* to) {
    const int64_t padded = round_up(rows, 16), piece = words(left);
    if (p.a_transposed)
      pack_paired_turned<Engine, X>(at(p.a, k * p.a_stride + begin), p.a_stride, left, rows,
                                    piece, padded, to);
    else
      pack_rows<Engine, X>(at(p.a, begin * p.a_stride + k), p.a_stride, rows, left, padded, piece,
                           to);
  }

  static void multiply(const P& p, int64_t begin, int64_t end, int64_t column, int64_t columns,
                       const void* packed, void* packed_rows, float* sums) {
    const int64_t rows = end - begin, padded = round_up(rows, Engine::kRowStep);
    uint32_t* const a = static_cast<uint32_t*>(packed_rows);
    const uint32_t* const b = static_cast<const uint32_t*>(packed);
    Engine::begin();
    const int64_t end_column = least(column + columns, p.columns);
    for (int64_t first = column; first < end_column; first += kGroup) {
      const int64_t last = least(first + kGroup, end_column);
      for (int64_t k = 0; k < p.depth; k += kPiece) {
        const int64_t left = least(p.depth - k, kPiece), piece = words(left);
        if (first == column || p.depth > kPiece) pack_piece(p, begin, rows, k, left, a);
        for (int64_t j = first; j < last; j += kPanel)
          for (int64_t step = 0; step < piece; step += kStep) {
            const auto add = k + step == 0 ? product<Engine, kSet> : product<Engine, kAdd>;
            add(padded, kPanel, least(kStep, piece - step), a + step, piece,
                b + panel_at(p, k, piece, j / kPanel) + step * kPanel, kPanel, sums + j - first,
                kSums, nullptr, {});
          }
      }
      for (int64_t i = 0; i < rows; ++i) finish(p, begin + i, first, last, sums + i * kSums);
    }
    Engine::end();
  }

  static void finish(const P& p, int64_t row, int64_t first, int64_t last, const float* sums) {
    T* const to = static_cast<T*>(p.c) + row * p.columns;
    for (int64_t j = first; j < last; j += kLanes) {
      const int64_t n = least(last - j, kLanes);
      Vec v = load<F32>(sums + j - first);
      if (p.bias) v += n == kLanes ? load<X>(at(p.bias, j)) : load<X>(at(p.bias, j), n);
      if (n == kLanes)
        store<X>(to + j, v);
      else
        store<X>(to + j, v, n);
    }
  }

  static constexpr LinearKernels table() { return {sizes, pack, multiply}; }
};

}  // namespace

const LinearKernels AT_LEVEL(linear)[2] = {LinearOf<BFloat16Engine, BF16>::table(),
                                           LinearOf<WidenedEngine, F16>::table()};
