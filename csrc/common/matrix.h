// Matrix products of blocks that are in the cache. Their operands are packed by common/packing.h.
//
// All operands are counted in words of 32 bits: one float, or two bfloat16 that are neighbours
// along the depth of the product (what VDPBF16PS and TDPBF16PS take). For C = A B:
//   A [rows][depth]           row-major, lda words from row to row
//   B [depth][columns]        row-major words, ldb words from row to row; columns % 16 == 0
//   C [rows][columns] floats  row-major, ldc floats from row to row
// An Engine says what a word is and how words are multiplied. Its steps say to what rows and depth
// (in elements) the caller pads its operands with zeros.
#pragma once

#include "common/math.h"

namespace {

// ---- Engines

#if defined(__AVX512F__)
constexpr int kFloatDepth = 32;
#elif defined(__AVX2__)
constexpr int kFloatDepth = 32;
#else
constexpr int kFloatDepth = 16;
#endif

struct FloatEngine {
  using Element = float;
  static constexpr int kPair = 1;       // elements in a word
  static constexpr int kDepthStep = 1;  // elements
  static constexpr int kRowStep = 1;
  static constexpr int kDepthMost = kFloatDepth;  // of one sum, in words
  static constexpr bool kExact = true;  // what float32 loses shows: no 16 bits round it away
  static constexpr bool kTiles = false;

  ALWAYS_INLINE static Vec multiply_add(uint32_t word, Vec b, Vec c) {
    float a;
    memcpy(&a, &word, 4);
    return fma(splat(a), b, c);
  }
  ALWAYS_INLINE static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  static void begin() {}
  static void end() {}
};

// For 16-bit operands, widened as they are packed. What they were rounded by is far above what a
// long sum rounds, so a piece is as long as B's columns stay in the L1 cache.
struct WidenedEngine : FloatEngine {
  static constexpr int kDepthMost = kLanes == 16 ? 128 : 256;
  static constexpr bool kExact = false;
};

#if defined(__AVX512BF16__)
struct Bf16Engine {
  using Element = uint16_t;
  static constexpr int kPair = 2;
  static constexpr int kDepthStep = 2;
  static constexpr int kRowStep = 1;
  static constexpr int kDepthMost = 128;
  static constexpr bool kExact = false;
  static constexpr bool kTiles = false;

  ALWAYS_INLINE static Vec multiply_add(uint32_t word, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(int(word)), (__m512bh)b);
  }
  ALWAYS_INLINE static Vec multiply_add(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
  static void begin() {}
  static void end() {}
};
#endif

#if defined(__AMX_BF16__)
// GCC's intrinsics do not say that they read memory: stores could be moved behind them.
inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

// The tiles' shapes never change, so they are configured once a task: 16 rows of 64 bytes each.
struct TileEngine {
  using Element = uint16_t;
  static constexpr int kPair = 2;
  static constexpr int kDepthStep = 32;
  static constexpr int kRowStep = 16;
  static constexpr int kDepthMost = 128;
  static constexpr bool kExact = false;
  static constexpr bool kTiles = true;

  ALWAYS_INLINE static Vec multiply_add(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
  static void begin() {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = 16;
    }
    finish_stores();
    _tile_loadconfig(config);
  }
  static void end() { _tile_release(); }
};
#endif

// For products of bfloat16, the best that this level has.
#if defined(__AMX_BF16__)
using BFloat16Engine = TileEngine;
#elif defined(__AVX512BF16__)
using BFloat16Engine = Bf16Engine;
#else
using BFloat16Engine = WidenedEngine;
#endif

// ---- Products

// Registers: kRowsMost * kVecsMost sums, kVecsMost of B's row, one of A.
#if defined(__AVX512F__)
constexpr int kRowsMost = 6, kVecsMost = 4;
#elif defined(__AVX2__)
constexpr int kRowsMost = 6, kVecsMost = 2;
#else
constexpr int kRowsMost = 4, kVecsMost = 2;
#endif

// Columns of a packed B that stand together. With floats as many as a tile of sums has: of a wider
// panel each tile would read a part of every row, and parts that lie far apart share the sets of
// the L1 cache.
template <class Engine>
constexpr int64_t kPanel = Engine::kPair == 1 && kVecsMost * kLanes < 64 ? 16 : 64;

// Vector work to be done between the instructions of a tiled product, whose unit works by itself: a
// callable that does a unit and says whether one was left. Other engines do not call it.
struct NothingMeanwhile {
  bool operator()() const { return false; }
};

enum Into { kSet, kAdd, kScaleAdd };  // C = AB;  C += AB;  C = C * scale[column] + AB

template <class Engine, Into kInto, int kRows, int kVecs>
ALWAYS_INLINE inline void product_tile(int64_t depth, const uint32_t* a, int64_t lda,
                                       const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                                       const float* scale) {
  // A narrow tile leaves registers free: they take sums of their own, or each multiply-add would
  // wait for the one before.
  constexpr int kSums = kVecs * 2 > kVecsMost ? 1 : kVecsMost / kVecs;
  if (kInto != kSet) {  // C is read last: it may be on its way from the L2 cache meanwhile
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) __builtin_prefetch(c + i * ldc);
  }
  Vec sums[kSums][kRows][kVecs];
#pragma GCC unroll 8
  for (int n = 0; n < kSums; ++n)
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) sums[n][i][j] = Vec{};
  const auto step = [&](int64_t k, Vec(&to)[kRows][kVecs]) ALWAYS_INLINE {
    Vec row[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) memcpy(&row[j], b + k * ldb + j * kLanes, sizeof(Vec));
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j)
        to[i][j] = Engine::multiply_add(a[i * lda + k], row[j], to[i][j]);
  };
  int64_t k = 0;
  for (; k + kSums <= depth; k += kSums)
#pragma GCC unroll 8
    for (int n = 0; n < kSums; ++n) step(k + n, sums[n]);
  for (; k < depth; ++k) step(k, sums[0]);
#pragma GCC unroll 8
  for (int n = kSums - 1; n > 0; --n)
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) sums[n / 2][i][j] += sums[n][i][j];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      Vec before, factor;
      if (kInto != kSet) memcpy(&before, c + i * ldc + j * kLanes, sizeof(Vec));
      Vec sum = sums[0][i][j];
      if (kInto == kAdd) sum += before;
      if (kInto == kScaleAdd) {
        memcpy(&factor, scale + j * kLanes, sizeof(Vec));
        sum = fma(before, factor, sum);
      }
      memcpy(c + i * ldc + j * kLanes, &sum, sizeof(Vec));
    }
}

template <class Engine, Into kInto, int kVecs>
void product_columns(int64_t rows, int64_t depth, const uint32_t* a, int64_t lda,
                     const uint32_t* b, int64_t ldb, float* c, int64_t ldc, const float* scale) {
  int64_t i = 0;
  for (; i + kRowsMost <= rows; i += kRowsMost)
    product_tile<Engine, kInto, kRowsMost, kVecs>(depth, a + i * lda, lda, b, ldb, c + i * ldc, ldc,
                                                  scale);
  a += i * lda;
  c += i * ldc;
  switch (rows - i) {
    case 5:
      if (kRowsMost > 5)
        product_tile<Engine, kInto, 5, kVecs>(depth, a, lda, b, ldb, c, ldc, scale);
      break;
    case 4:
      if (kRowsMost > 4)
        product_tile<Engine, kInto, 4, kVecs>(depth, a, lda, b, ldb, c, ldc, scale);
      break;
    case 3:
      product_tile<Engine, kInto, 3, kVecs>(depth, a, lda, b, ldb, c, ldc, scale);
      break;
    case 2:
      product_tile<Engine, kInto, 2, kVecs>(depth, a, lda, b, ldb, c, ldc, scale);
      break;
    case 1:
      product_tile<Engine, kInto, 1, kVecs>(depth, a, lda, b, ldb, c, ldc, scale);
      break;
  }
}

#if defined(__AMX_BF16__)
// Four tiles of C at a time: each tile of A and of B that is loaded is used twice.
template <bool kAddTo, class Meanwhile>
ALWAYS_INLINE inline void product_four_tiles(int64_t depth, const uint32_t* a, int64_t lda,
                                             const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                                             Meanwhile& meanwhile) {
  const int64_t a_bytes = 4 * lda, b_bytes = 4 * ldb, c_bytes = 4 * ldc;
  if (kAddTo) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    _tile_loadd(2, c + 16 * ldc, c_bytes);
    _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += 16) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b + k * ldb, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + k * ldb + 16, b_bytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * lda + k, a_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    meanwhile();
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  _tile_stored(2, c + 16 * ldc, c_bytes);
  _tile_stored(3, c + 16 * ldc + 16, c_bytes);
}

// The edges: two tiles beside each other or one over the other, or a single one.
template <bool kAddTo, int kDown, int kAcross>
inline void product_few_tiles(int64_t depth, const uint32_t* a, int64_t lda, const uint32_t* b,
                              int64_t ldb, float* c, int64_t ldc) {
  const int64_t a_bytes = 4 * lda, b_bytes = 4 * ldb, c_bytes = 4 * ldc;
  if (kAddTo) {
    _tile_loadd(0, c, c_bytes);
    if (kAcross == 2) _tile_loadd(1, c + 16, c_bytes);
    if (kDown == 2) _tile_loadd(2, c + 16 * ldc, c_bytes);
  } else {
    _tile_zero(0);
    if (kAcross == 2) _tile_zero(1);
    if (kDown == 2) _tile_zero(2);
  }
  for (int64_t k = 0; k < depth; k += 16) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b + k * ldb, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kAcross == 2) {
      _tile_loadd(7, b + k * ldb + 16, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kDown == 2) {
      _tile_loadd(5, a + 16 * lda + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (kAcross == 2) _tile_stored(1, c + 16, c_bytes);
  if (kDown == 2) _tile_stored(2, c + 16 * ldc, c_bytes);
}

template <bool kAddTo, class Meanwhile>
void product_in_tiles(int64_t rows, int64_t columns, int64_t depth, const uint32_t* a, int64_t lda,
                      const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                      Meanwhile& meanwhile) {
  finish_stores();
  for (int64_t j = 0; j < columns; j += 32) {
    const bool across = j + 32 <= columns;
    for (int64_t i = 0; i < rows; i += 32) {
      const bool down = i + 32 <= rows;
      const uint32_t* const from = a + i * lda;
      float* const to = c + i * ldc + j;
      if (down && across)
        product_four_tiles<kAddTo>(depth, from, lda, b + j, ldb, to, ldc, meanwhile);
      else if (across)
        product_few_tiles<kAddTo, 1, 2>(depth, from, lda, b + j, ldb, to, ldc);
      else if (down)
        product_few_tiles<kAddTo, 2, 1>(depth, from, lda, b + j, ldb, to, ldc);
      else
        product_few_tiles<kAddTo, 1, 1>(depth, from, lda, b + j, ldb, to, ldc);
    }
  }
}
#endif

// kVecs registers of columns, piece by piece of the depth: B's piece and C's columns stay in the L1
// cache meanwhile.
template <class Engine, Into kInto, int kVecs>
inline void product_pieces(int64_t rows, int64_t depth, const uint32_t* a, int64_t lda,
                           const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                           const float* scale) {
  const int64_t most = Engine::kDepthMost;
  product_columns<Engine, kInto, kVecs>(rows, depth < most ? depth : most, a, lda, b, ldb, c, ldc,
                                        scale);
  for (int64_t k = most; k < depth; k += most)
    product_columns<Engine, kAdd, kVecs>(rows, depth - k < most ? depth - k : most, a + k, lda,
                                         b + k * ldb, ldb, c, ldc, nullptr);
}

// C (+)= A B. depth in words. `scale` [columns] is read for kScaleAdd alone.
//
// A sum starts at zero and joins C in the end, and a long one is cut into pieces: its rounding
// error grows with the square root of the piece's length, not of the sequence's. The pieces are as
// long as they may be for the error to stay that of torch's products, which sum by lanes.
template <class Engine, Into kInto, class Meanwhile = const NothingMeanwhile>
inline void product(int64_t rows, int64_t columns, int64_t depth, const uint32_t* a, int64_t lda,
                    const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                    const float* scale = nullptr, Meanwhile&& meanwhile = {}) {
  (void)meanwhile;
#if defined(__AMX_BF16__)
  if constexpr (Engine::kTiles) {
    if (kInto == kScaleAdd)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) c[i * ldc + j] *= scale[j];
    product_in_tiles<kInto != kSet>(rows, columns, depth, a, lda, b, ldb, c, ldc, meanwhile);
    return;
  } else
#endif
  {
    constexpr int kFull = kVecsMost * kLanes;
    int64_t j = 0;
    for (; j + kFull <= columns; j += kFull)
      product_pieces<Engine, kInto, kVecsMost>(rows, depth, a, lda, b + j, ldb, c + j, ldc,
                                               scale + j);
    if (j == columns) return;
    b += j;
    c += j;
    scale += j;
    switch ((columns - j) / kLanes) {
      case 3:
        if (kVecsMost > 3)
          product_pieces<Engine, kInto, 3>(rows, depth, a, lda, b, ldb, c, ldc, scale);
        break;
      case 2:
        if (kVecsMost > 2)
          product_pieces<Engine, kInto, 2>(rows, depth, a, lda, b, ldb, c, ldc, scale);
        break;
      case 1:
        product_pieces<Engine, kInto, 1>(rows, depth, a, lda, b, ldb, c, ldc, scale);
        break;
    }
  }
}

}  // namespace
