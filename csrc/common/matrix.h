// Matrix products of blocks that are in the cache, and the packing of their operands.
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

// ---- Packing

// Sixteen words.
#if defined(__AVX512F__)
typedef __m512i Words;
ALWAYS_INLINE inline void store_words(uint32_t* to, Words w) { _mm512_storeu_si512(to, w); }
#else
struct Words {
  Vec part[16 / kLanes];
};
ALWAYS_INLINE inline void store_words(uint32_t* to, const Words& w) { memcpy(to, &w, 64); }
#endif

// Words along a row: 16 floats, or 32 bfloat16; `count` elements are there, the rest reads as zero.
template <class Engine, class X>
ALWAYS_INLINE inline Words load_along(const typename X::T* row, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (Engine::kPair == 2) {
    const __mmask32 mask = count >= 32 ? 0xffffffffu : (1u << count) - 1;
    return _mm512_maskz_loadu_epi16(mask, row);
  } else {
    const Vec v = count >= 16 ? load<X>(row) : load<X>(row, count);
    return (Words)v;
  }
#else
  Words words{};
  if (count >= 16) {
    for (int i = 0; i < 16; i += kLanes) words.part[i / kLanes] = load<X>(row + i);
  } else {
    for (int i = 0; i < count; i += kLanes)
      words.part[i / kLanes] = load<X>(row + i, count - i < kLanes ? count - i : kLanes);
  }
  return words;
#endif
}

// Words across rows: element j of the row, or of the row and the one `next` elements on (not read
// if `second` is false), for j < count <= 16.
template <class Engine, class X>
ALWAYS_INLINE inline Words load_across(const typename X::T* row, int64_t next, bool second,
                                       int64_t count) {
  (void)next, (void)second;
#if defined(__AVX512F__)
  if constexpr (Engine::kPair == 2) {
    const __mmask16 mask = count >= 16 ? 0xffff : (1u << count) - 1;
    const __m256i low = _mm256_maskz_loadu_epi16(mask, row);
    const __m256i high = _mm256_maskz_loadu_epi16(second ? mask : 0, row + next);
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }
#endif
  return load_along<Engine, X>(row, count);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Eight registers as a square: lane j of r[i] becomes lane i of r[j].
ALWAYS_INLINE inline void transpose_square(__m256 r[8]) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
#endif

// Word j of w[i] becomes word i of w[j].
inline void transpose(Words w[16]) {
#if defined(__AVX512F__)
  Words t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(w[i], w[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(w[i], w[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    w[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    w[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    w[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    w[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(w[i], w[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(w[i], w[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    w[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    w[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    w[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    w[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
#elif defined(__AVX2__)
  const auto turned = [&](int i, int part, __m256 r[8]) ALWAYS_INLINE {
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n) r[n] = w[i + n].part[part];
    transpose_square(r);
  };
  const auto put = [&](int i, int part, const __m256 r[8]) ALWAYS_INLINE {
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n) w[i + n].part[part] = r[n];
  };
  __m256 r[8], other[8];
  turned(0, 0, r);
  put(0, 0, r);
  turned(8, 1, r);
  put(8, 1, r);
  turned(0, 1, r);
  turned(8, 0, other);
  put(8, 0, r);
  put(0, 1, other);
#else
  uint32_t word[16][16];
  memcpy(word, w, sizeof word);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < i; ++j) {
      const uint32_t one = word[i][j];
      word[i][j] = word[j][i];
      word[j][i] = one;
    }
  memcpy(w, word, sizeof word);
#endif
}

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Rows far apart are new to the CPU's own prefetching: it would wait for each.
ALWAYS_INLINE inline void fetch(const void* address) { __builtin_prefetch(address); }

// Rows of x [rows][size], `stride` elements apart, as rows of words: to [padded_rows][depth words],
// zeros where x ends.
template <class Engine, class X>
void pack_rows(const typename X::T* x, int64_t stride, int64_t rows, int64_t size,
               int64_t padded_rows, int64_t words, uint32_t* to) {
  for (int64_t i = 0; i < padded_rows; ++i, to += words)
    for (int64_t j = 0; j < words; j += 16) {
      const int64_t left = i < rows ? size - j * Engine::kPair : 0;
      const Words w =
          left > 0 ? load_along<Engine, X>(x + i * stride + j * Engine::kPair, left) : Words{};
      if (j + 16 <= words)
        store_words(to + j, w);
      else
        memcpy(to + j, &w, 4 * size_t(words - j));
    }
}

// x [rows][size] turned: word (k, i) = elements of row i at depth k: to [depth words][ldt], for
// rows up to padded_rows (a multiple of 16).
template <class Engine, class X>
void pack_turned(const typename X::T* x, int64_t stride, int64_t rows, int64_t size,
                 int64_t padded_rows, int64_t words, uint32_t* to, int64_t ldt) {
  for (int64_t i = 0; i < padded_rows; i += 16)
    for (int64_t k = 0; k < words; k += 16) {
      Words w[16];
      const int64_t left = size - k * Engine::kPair;
      for (int r = 0; r < 16; ++r)
        w[r] = i + r < rows && left > 0
                   ? load_along<Engine, X>(x + (i + r) * stride + k * Engine::kPair, left)
                   : Words{};
      transpose(w);
      for (int64_t r = 0; r < 16 && k + r < words; ++r) store_words(to + (k + r) * ldt + i, w[r]);
    }
}

// x [rows][size] with neighbouring rows in a word: word (p, j) = element j of rows kPair * p and
// on: to [row words][columns], columns a multiple of 16.
template <class Engine, class X>
void pack_paired(const typename X::T* x, int64_t stride, int64_t rows, int64_t size,
                 int64_t row_words, int64_t columns, uint32_t* to) {
  for (int64_t p = 0; p < row_words; ++p, to += columns) {
    const int64_t i = p * Engine::kPair;
    for (int64_t j = 0; j < columns; j += 16) {
      const bool there = i < rows && j < size;
      fetch(x + (i + 16 * Engine::kPair) * stride + j);
      store_words(to + j, there ? load_across<Engine, X>(x + i * stride + j, stride, i + 1 < rows,
                                                         size - j < 16 ? size - j : 16)
                                : Words{});
    }
  }
}

// The same turned: word (j, p): to [padded_size][row_words], row_words a multiple of 16.
template <class Engine, class X>
void pack_paired_turned(const typename X::T* x, int64_t stride, int64_t rows, int64_t size,
                        int64_t row_words, int64_t padded_size, uint32_t* to) {
  for (int64_t p = 0; p < row_words; p += 16)
    for (int64_t j = 0; j < padded_size; j += 16) {
      Words w[16];
      for (int r = 0; r < 16; ++r) {
        const int64_t i = (p + r) * Engine::kPair;
        const bool there = i < rows && j < size;
        fetch(x + (i + 16 * Engine::kPair) * stride + j);
        w[r] = there ? load_across<Engine, X>(x + i * stride + j, stride, i + 1 < rows,
                                              size - j < 16 ? size - j : 16)
                     : Words{};
      }
      transpose(w);
      for (int64_t r = 0; r < 16 && j + r < padded_size; ++r)
        store_words(to + (j + r) * row_words + p, w[r]);
    }
}

// Two rows of 16 floats as one row of words, for the depth of a product.
template <class Engine>
ALWAYS_INLINE inline void store_pair(uint32_t* to, Vec first, Vec second) {
#if defined(__AVX512BF16__)
  if constexpr (Engine::kPair == 2) {
    alignas(64) static const uint16_t kInterleave[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(kInterleave);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    store_words(to, _mm512_permutexvar_epi16(order, both));
  }
#else
  (void)to, (void)first, (void)second;
#endif
}

// The transpose of c [size][ldc] times `factor` by column, into rows of y: y[i][j] = c[j][i] *
// factor[i], i < rows, j < size.
template <class X>
void store_turned(const float* c, int64_t ldc, const float* factor, int64_t rows, int64_t size,
                  typename X::T* y, int64_t stride) {
  for (int64_t i = 0; i < rows; i += 16) {
    const int64_t most = rows - i < 16 ? rows - i : 16;
    for (int64_t j = 0; j < size; j += 16) {
      const int64_t wide = size - j < 16 ? size - j : 16;
      alignas(64) float block[16][16] = {};
      for (int64_t r = 0; r < wide; ++r)
        for (int64_t n = 0; n < 16; n += kLanes) {
          Vec v, f;
          memcpy(&v, c + (j + r) * ldc + i + n, sizeof v);
          memcpy(&f, factor + i + n, sizeof f);
          v *= f;
          memcpy(&block[r][n], &v, sizeof v);
        }
      Words w[16];
      memcpy(w, block, sizeof w);
      transpose(w);
      memcpy(block, w, sizeof w);
      for (int64_t r = 0; r < most; ++r)
        for (int64_t n = 0; n < wide; n += kLanes) {
          Vec v;
          memcpy(&v, &block[r][n], sizeof v);
          typename X::T* const to = y + (i + r) * stride + j + n;
          if (n + kLanes <= wide)
            store<X>(to, v);
          else
            store<X>(to, v, wide - n);
        }
    }
  }
}

}  // namespace
