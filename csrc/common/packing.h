// The packing of a product's operands into the words and panels of common/matrix.h, and of its
// result back into rows. In an anonymous namespace for the reason given in common/dtype.h.
#pragma once

#include "common/matrix.h"

namespace {

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
