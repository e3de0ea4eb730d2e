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
  // The count, times 2^16, as a broken line through all codes' values, from 0 to the last decade's
  // last value: each stretch, which lies in a decade or between two, is less steep than the one
  // before, so the line is the least of its stretches' lines. Within a factor of 16 it has at most
  // three. By the floats' bits from `from` on, shifted by kShift, modulo 8: those lines,
  // x * rise + base. The stretch to 1 is steeper again: there the count is the greater one.
  static constexpr int kShift = 25;  // four octaves
  int32_t from;
  float rise[3][8], base[3][8], last_rise, last_base;

  constexpr Code() : first(), width(), from(), rise(), base(), last_rise(), last_base() {
    constexpr double tens[] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
    for (int i = 0; i < 7; ++i) {
      const int exponent = kSigned ? i : i + 1;
      first[(exponent + 7) % 8] = float(tens[i] * (0.1 + 0.45 / (1 << exponent)));
      width[(exponent + 7) % 8] = float(tens[i] * 0.9);
    }
    if (kSigned) first[6] = 1;  // a count of 128

    double corner[16]{}, steep[15]{}, start[15]{}, count = 0;
    for (int i = 0; i < 15; ++i) {  // up to a decade's first value, then to its last one; then to 1
      const double ten = i < 14 ? tens[i / 2] : 0, cells = 1 << (kSigned ? i / 2 : i / 2 + 1);
      const double inset = ten * 0.45 / cells;
      const bool last_value = i % 2;
      corner[i + 1] = i == 14 ? 1 : last_value ? ten - inset : 0.1 * ten + inset;
      const double to_count = (last_value ? 2 * cells - 1 : cells) - (kSigned ? 0 : 1);
      if (corner[i + 1] > corner[i]) steep[i] = (to_count - count) / (corner[i + 1] - corner[i]);
      start[i] = count - corner[i] * steep[i];
      count = to_count;
    }
    last_rise = float(0x1p16 * steep[14]);
    last_base = float(0x1p16 * start[14]);
    // Bounds that are powers of 16 apart, one of them the third decade's first value, have at most
    // three stretches between two of them.
    double upper = corner[5];
    while (upper < 1) upper *= 16;
    int32_t bits = 127 << 23;  // of `upper`, which is in [1, 16)
    double power = 1;
    for (; power * 2 <= upper; power *= 2) bits += 1 << 23;
    bits += int32_t((upper / power - 1) * 0x1p23);
    from = bits & ((1 << kShift) - 1);
    for (int group = (bits - from) >> kShift; upper > 0x1p-29; upper /= 16) {
      const double lower = upper / 16;
      --group;  // of values from `lower` on
      int met = 0;
      for (int i = 0; i < 14; ++i) {
        if (steep[i] == 0 || corner[i] >= upper * (1 - 1e-6) ||
            corner[i + 1] <= lower * (1 + 1e-6))
          continue;
        for (int rest = met++; rest < 3; ++rest) {
          rise[rest][group % 8] = float(0x1p16 * steep[i]);
          base[rest][group % 8] = float(0x1p16 * start[i]);
        }
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

inline Vec least(Vec a, Vec b) { return a < b ? a : b; }
inline Vec greatest(Vec a, Vec b) { return a > b ? a : b; }

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
    const Ints group = ((Ints)greatest(x, splat(0x1p-30f)) - code.from) >> code.kShift;
    Vec place = fma(x, lookup8(code.rise[0], group), lookup8(code.base[0], group));
    place = least(place, fma(x, lookup8(code.rise[1], group), lookup8(code.base[1], group)));
    place = least(place, fma(x, lookup8(code.rise[2], group), lookup8(code.base[2], group)));
    place = greatest(place, fma(x, splat(code.last_rise), splat(code.last_base)));
    const Ints count = (Ints)(((Bits)nearest_integer(place) + lift) >> 16);
    if (!kSigned) return count;
    // -1 has no code: the most negative value is that of code 0, as in bitsandbytes.
    const Ints signed_count = v < 0.0f ? 127 - count : 127 + count;
    return signed_count > 0 ? signed_count : Ints{};
  }
};

}  // namespace
