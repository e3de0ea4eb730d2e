// The dynamic 8-bit code (Dettmers 2015, arXiv:1511.04561; Dettmers et al. 2022, arXiv:2110.02861),
// the same as bitsandbytes': seven decades below 1, the next one with twice as many values as the
// one below, evenly spaced in it; 0 and 1 besides. Signed: 1, 2, .. 64 values a decade and their
// negatives, code 127 is 0. Unsigned: 2, 4, .. 128 values a decade, code 0 is 0. Code 255 is 1.
//
// Counted from zero, a decade's first value is a power of two. So the exponent of the count, as a
// float, is the decade, its mantissa the place in it, and neither direction needs a table of 256.
#pragma once

#include "common/elements.h"

namespace {

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

template <bool kSigned>
struct Code {
  // By decade, the last one holding 1 alone: x * slope + offset is the count of the cell that x is
  // in, and its place there; `last` the decade's last count. 
  float slope[8], offset[8], last[8];
  float threshold[7];  // from where on the next decade's first value is nearer than this one's last
  float zero;          // below, 0 is nearest
  // By the exponent of the count's float, modulo 8: value = first + width * (mantissa - 1).
  float first[8], width[8];
  // The decade below and the threshold in each octave from 2^-31 to 1, by exponent modulo 32.
  int32_t octave_decade[32];
  float octave_threshold[32];

  constexpr Code()
      : slope(), offset(), last(), threshold(), zero(), first(), width(), octave_decade(),
        octave_threshold() {
    constexpr double tens[] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
    for (int i = 0; i < 7; ++i) {
      const int exponent = kSigned ? i : i + 1;
      const double count = 1 << exponent;
      slope[i] = float(count / (0.9 * tens[i]));
      offset[i] = float(count * (8.0 / 9.0));
      last[i] = float(2 * count - 1);
      first[(exponent + 7) % 8] = float(tens[i] * (0.1 + 0.45 / count));
      width[(exponent + 7) % 8] = float(tens[i] * 0.9);
      threshold[i] = float(i < 6 ? tens[i] * (1 + 0.9 / count) : 1 - 0.225 / count);
      if (i == 0) zero = float(0.5 * tens[i] * (0.1 + 0.45 / count));
    }
    offset[7] = last[7] = kSigned ? 128 : 256;
    if (kSigned) first[6] = 1;  // a count of 128
    double low = 0x1p-31;
    for (int octave = 0; octave < 32; ++octave, low *= 2) {  // exponents 96 to 127, biased
      octave_threshold[octave] = 2;
      for (int i = 0; i < 7; ++i) {
        if (threshold[i] < low) octave_decade[octave] = i + 1;
        if (threshold[i] >= low && threshold[i] < 2 * low) octave_threshold[octave] = threshold[i];
      }
    }
  }
};

template <bool kSigned>
constexpr Code<kSigned> kCode{};

// table[index % 8].
inline Vec lookup(const float* table, Ints index) {
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps((__m512i)index, _mm512_broadcast_f32x8(_mm256_loadu_ps(table)));
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
#else
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = table[index[i] & 7];
  return out;
#endif
}

inline Ints truncate(Vec v) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvttps_epi32(v);
#elif defined(__AVX2__)
  return (Ints)_mm256_cvttps_epi32(v);
#else
  return __builtin_convertvector(v, Ints);
#endif
}

inline Vec to_float(Ints v) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps((__m512i)v);
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps((__m256i)v);
#else
  return __builtin_convertvector(v, Vec);
#endif
}

ALWAYS_INLINE inline Ints load_codes(const uint8_t* from, int64_t count) {
  Bytes packed{};
  memcpy(&packed, from, size_t(count));
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32((__m128i)packed);
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)packed));
#else
  return __builtin_convertvector(packed, Ints);
#endif
}

ALWAYS_INLINE inline void store_codes(uint8_t* to, Ints codes, int64_t count) {
#if defined(__AVX512F__)
  const Bytes packed = (Bytes)_mm512_cvtepi32_epi8((__m512i)codes);
#elif defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128((__m256i)codes);
  const __m128i high = _mm256_extracti128_si256((__m256i)codes, 1);
  const __m128i words = _mm_packus_epi32(low, high);
  const Bytes packed = (Bytes)_mm_cvtsi128_si64(_mm_packus_epi16(words, words));
#else
  const Bytes packed = __builtin_convertvector(codes, Bytes);
#endif
  memcpy(to, &packed, size_t(count));
}

// The value of the count-th code from zero, counts from 0 to 128 (signed) or 255 (unsigned).
template <bool kSigned>
ALWAYS_INLINE inline Vec value_of(Ints count) {
  const Code<kSigned>& code = kCode<kSigned>;
  const Ints place = kSigned ? count : count + 1;
  const Bits bits = (Bits)to_float(place);
  const Vec fraction = (Vec)((bits & 0x7fffffu) | 0x3f800000u) - 1.0f;
  const Ints exponent = (Ints)(bits >> 23);
  const Vec value =
      fma(fraction, lookup(code.width, exponent), lookup(code.first, exponent));
  if (kSigned) return count == 0 ? splat(0.0f) : value;
  return count == 255 ? splat(1.0f) : value;
}

// The decade of x.
template <bool kSigned>
ALWAYS_INLINE inline Ints decade_of(Vec x) {
  const Code<kSigned>& code = kCode<kSigned>;
#if defined(__AVX512F__)
  const __m512i octave = _mm512_srli_epi32((__m512i)x, 23);
  const __m512i low = _mm512_permutex2var_epi32(_mm512_loadu_si512(code.octave_decade), octave,
                                                _mm512_loadu_si512(code.octave_decade + 16));
  const __m512 threshold = _mm512_permutex2var_ps(_mm512_loadu_ps(code.octave_threshold), octave,
                                                  _mm512_loadu_ps(code.octave_threshold + 16));
  const __mmask16 above = _mm512_cmp_ps_mask(x, threshold, _CMP_GE_OQ);
  return (Ints)_mm512_mask_add_epi32(low, above, low, _mm512_set1_epi32(1));
#else
  Ints decade{};
  for (int i = 0; i < 7; ++i) decade -= (Ints)(x >= code.threshold[i]);
  return decade;
#endif
}

// The count whose value is nearest to x, 0 <= x <= 1.
template <bool kSigned>
ALWAYS_INLINE inline Ints nearest_count(Vec x) {
  const Code<kSigned>& code = kCode<kSigned>;
  const Ints decade = decade_of<kSigned>(x);
  const Vec count = fma(x, lookup(code.slope, decade), lookup(code.offset, decade));
  const Vec last = lookup(code.last, decade);
  const Ints whole = truncate(count < last ? count : last) - (kSigned ? 0 : 1);
  return x < code.zero ? Ints{} : whole;
}

// One of the two counts around x, the nearer the likelier: `random` holds bits below 2^16.
template <bool kSigned>
ALWAYS_INLINE inline Ints random_count(Vec x, Bits random) {
  Ints low = nearest_count<kSigned>(x);
  low += (Ints)(value_of<kSigned>(low) > x);  // a comparison is -1 where it holds
  const Vec below = value_of<kSigned>(low);
  const Ints high = low < (kSigned ? 128 : 255) ? low + 1 : low;
  const Vec gap = value_of<kSigned>(high) - below;
  const Vec draw = (to_float((Ints)random) + 0.5f) * 0x1p-16f;
  return draw * gap < x - below ? high : low;
}

template <bool kSigned>
ALWAYS_INLINE inline Vec decode(Ints codes, Vec scale) {
  if (!kSigned) return value_of<false>(codes) * scale;
  const Ints above = codes - 127;
  const Ints negative = above < 0;
  const Vec value = value_of<true>(negative ? -above : above) * scale;
  return (Vec)((Bits)value ^ ((Bits)negative & 0x80000000u));
}

// Codes of v, with inverse = 1 / the largest magnitude of its block.
template <bool kSigned>
ALWAYS_INLINE inline Ints encode(Vec v, Vec inverse, bool stochastic, Bits random) {
  const Vec x = magnitude(v) * inverse;
  const Ints count =
      stochastic ? random_count<kSigned>(x, random) : nearest_count<kSigned>(x);
  if (!kSigned) return count;
  // -1 has no code: the most negative value is that of code 0, as in bitsandbytes.
  const Ints most = count < 127 ? count : Ints{} + 127;
  return v < 0.0f ? 127 - most : 127 + count;
}

}  // namespace
