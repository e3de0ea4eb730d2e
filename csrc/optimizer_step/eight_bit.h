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
  // By the exponent of the count's float, modulo 8: value = first + width * (mantissa - 1).
  float first[8], width[8];
  // The count, times 2^16, as a broken line through all codes' values: in the stretch that begins
  // at `corner` it is x * rise + base. Stretches lie in a decade or between two.
  float corner[16], rise[16], base[16];
  // By octave from 2^-31 to 1, which is the exponent modulo 32: the stretch at its beginning, and
  // the corners in it, of which there are at most two.
  int32_t octave_stretch[32];
  float octave_corner[2][32];

  constexpr Code()
      : first(), width(), corner(), rise(), base(), octave_stretch(), octave_corner() {
    constexpr double tens[] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
    for (int i = 0; i < 7; ++i) {
      const int exponent = kSigned ? i : i + 1;
      first[(exponent + 7) % 8] = float(tens[i] * (0.1 + 0.45 / (1 << exponent)));
      width[(exponent + 7) % 8] = float(tens[i] * 0.9);
    }
    if (kSigned) first[6] = 1;  // a count of 128
    double from = 0, from_count = 0;
    for (int i = 0; i < 15; ++i) {  // up to a decade's first value, then to its last one; then to 1
      const double ten = i < 14 ? tens[i / 2] : 0, cells = 1 << (kSigned ? i / 2 : i / 2 + 1);
      const double inset = ten * 0.45 / cells;
      const bool last_value = i % 2;
      const double to = i == 14 ? 1 : last_value ? ten - inset : 0.1 * ten + inset;
      const double to_count = (last_value ? 2 * cells - 1 : cells) - (kSigned ? 0 : 1);
      const double steepness = to > from ? (to_count - from_count) / (to - from) : 0;
      corner[i] = float(from);
      rise[i] = float(0x1p16 * steepness);
      base[i] = float(0x1p16 * (from_count - from * steepness));
      from = to;
      from_count = to_count;
    }
    double low = 0x1p-31;
    for (int octave = 0; octave < 32; ++octave, low *= 2) {  // exponents 96 to 127, biased
      int met = 0;
      octave_corner[0][octave] = octave_corner[1][octave] = 2;
      for (int i = 1; i < 15; ++i) {
        if (corner[i] < low) octave_stretch[octave] = i;
        if (corner[i] >= low && corner[i] < 2 * low) octave_corner[met++][octave] = corner[i];
      }
    }
  }
};

template <bool kSigned>
constexpr Code<kSigned> kCode{};

// table[index % 8].
inline Vec lookup8(const float* table, Ints index) {
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

// table[index], index < 16.
inline Vec lookup16(const float* table, Ints index) {
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
#else
  const Vec low = lookup8(table, index), high = lookup8(table + 8, index);
  return index < 8 ? low : high;
#endif
}

inline Ints nearest_integer(Vec v) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtps_epi32(v);
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtps_epi32(v);
#else
  return __builtin_convertvector(v + 0.5f, Ints);
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

// What is above 255 becomes 255.
ALWAYS_INLINE inline void store_codes(uint8_t* to, Ints codes, int64_t count) {
#if defined(__AVX512F__)
  const Bytes packed = (Bytes)_mm512_cvtusepi32_epi8((__m512i)codes);
#elif defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128((__m256i)codes);
  const __m128i high = _mm256_extracti128_si256((__m256i)codes, 1);
  const __m128i words = _mm_packus_epi32(low, high);
  const Bytes packed = (Bytes)_mm_cvtsi128_si64(_mm_packus_epi16(words, words));
#else
  const Bytes packed = __builtin_convertvector(codes < 255 ? codes : Ints{} + 255, Bytes);
#endif
  memcpy(to, &packed, size_t(count));
}

// The values of codes, times a scale.
template <bool kSigned>
struct Decoder {
  float first[8], width[8], most;
  explicit Decoder(float scale) : most(scale) {
    for (int i = 0; i < 8; ++i) first[i] = kCode<kSigned>.first[i] * scale;
    for (int i = 0; i < 8; ++i) width[i] = kCode<kSigned>.width[i] * scale;
  }

  ALWAYS_INLINE Vec operator()(Ints codes) const {
    const Ints distance = codes - 127;
    const Ints count = !kSigned ? codes + 1 : distance < 0 ? -distance : distance;
    const Bits bits = (Bits)to_float(count);
    const Vec fraction = (Vec)((bits & 0x7fffffu) | 0x3f800000u) - 1.0f;
    const Ints exponent = (Ints)(bits >> 23);
    const Vec value = fma(fraction, lookup8(width, exponent), lookup8(first, exponent));
    if (!kSigned) return codes == 0 ? splat(0.0f) : codes == 255 ? splat(most) : value;
    const Bits sign = (Bits)distance & 0x80000000u;
    return (Vec)((Bits)(count == 0 ? splat(0.0f) : value) | sign);
  }
};

// The stretch of the broken line that x lies in.
template <bool kSigned>
ALWAYS_INLINE inline Ints stretch_of(Vec x) {
  const Code<kSigned>& code = kCode<kSigned>;
#if defined(__AVX512F__)
  const __m512 held = _mm512_max_ps(x, _mm512_set1_ps(0x1p-31f));
  const __m512i octave = _mm512_srli_epi32((__m512i)held, 23), one = _mm512_set1_epi32(1);
  __m512i stretch = _mm512_permutex2var_epi32(_mm512_loadu_si512(code.octave_stretch), octave,
                                              _mm512_loadu_si512(code.octave_stretch + 16));
  for (const auto& corners : code.octave_corner) {
    const __m512 corner = _mm512_permutex2var_ps(_mm512_loadu_ps(corners), octave,
                                                 _mm512_loadu_ps(corners + 16));
    const __mmask16 beyond = _mm512_cmp_ps_mask(x, corner, _CMP_GE_OQ);
    stretch = _mm512_mask_add_epi32(stretch, beyond, stretch, one);
  }
  return (Ints)stretch;
#else
  Ints stretch{};
  for (int i = 1; i < 15; ++i) stretch -= (Ints)(x >= code.corner[i]);
  return stretch;
#endif
}

// Codes of values in units of a scale. The place of a value among the codes is a fixed-point number
// with 16 bits below the point; `lift`, from 0 to 2^16 - 1, is added before they are cut off: half
// of 2^16 rounds to nearest, random bits round up with the odds of what is cut off.
template <bool kSigned>
struct Encoder {
  Vec inverse;
  explicit Encoder(float scale) : inverse(splat(scale > 0 ? 1 / scale : 0)) {}

  ALWAYS_INLINE Ints operator()(Vec v, Bits lift) const {
    const Code<kSigned>& code = kCode<kSigned>;
    const Vec x = (kSigned ? magnitude(v) : v) * inverse;
    const Ints stretch = stretch_of<kSigned>(x);
    const Vec place = fma(x, lookup16(code.rise, stretch), lookup16(code.base, stretch));
    const Ints count = (Ints)(((Bits)nearest_integer(place) + lift) >> 16);
    if (!kSigned) return count;
    // -1 has no code: the most negative value is that of code 0, as in bitsandbytes.
    const Ints signed_count = v < 0.0f ? 127 - count : 127 + count;
    return signed_count > 0 ? signed_count : Ints{};
  }
};

}  // namespace
