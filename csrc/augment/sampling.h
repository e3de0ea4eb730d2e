// How a row of the output is read from the source. Included once for each instruction set.
#pragma once

#include "augment/augment.h"
#include "augment/pixel.h"
#include "common/math.h"

namespace {

// ------------------------------------------------------------------ rows: the vertical direction

// 8 bits times weights of 16: products keep 8 more bits (with signs: 6), and are added as they are.
constexpr int kMiddle = 128;

ALWAYS_INLINE inline int rounding(int taps) {  // each product was cut off, by half a unit in mean
  const int lost = taps / 2;
  return kMiddle + (lost < kMiddle - 1 ? lost : kMiddle - 1);
}

ALWAYS_INLINE inline uint8_t mixed_byte(const uint8_t* const* rows, const uint16_t* w, int taps,
                                        bool with_signs, int64_t x) {
  if (!with_signs) {
    uint32_t sum = uint32_t(rounding(taps));
    for (int k = 0; k < taps; ++k) sum += (uint32_t(rows[k][x]) << 8) * w[k] >> 16;
    return uint8_t(sum >> 8);
  }
  int sum = 32;
  for (int k = 0; k < taps; ++k) sum += ((rows[k][x] << 7) * int16_t(w[k]) + 16384) >> 15;
  sum >>= 6;
  return uint8_t(sum < 0 ? 0 : (sum > 255 ? 255 : sum));
}

#if defined(__AVX512F__)
constexpr int kBytes = 64;
typedef __m512i Block;
ALWAYS_INLINE inline Block load_block(const uint8_t* p) { return _mm512_loadu_si512(p); }
ALWAYS_INLINE inline void store_block(uint8_t* p, Block v) { _mm512_storeu_si512(p, v); }
ALWAYS_INLINE inline Block words(int w) { return _mm512_set1_epi16(short(w)); }
#define OF_BLOCK(name) _mm512_##name
#elif defined(__AVX2__)
constexpr int kBytes = 32;
typedef __m256i Block;
ALWAYS_INLINE inline Block load_block(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
ALWAYS_INLINE inline void store_block(uint8_t* p, Block v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
}
ALWAYS_INLINE inline Block words(int w) { return _mm256_set1_epi16(short(w)); }
#define OF_BLOCK(name) _mm256_##name
#endif

#if defined(__AVX2__)
template <bool kSigns>
ALWAYS_INLINE inline Block product(Block p, Block w) {  // p: bytes in the upper halves of words
  if (!kSigns) return OF_BLOCK(mulhi_epu16)(p, w);
  return OF_BLOCK(mulhrs_epi16)(OF_BLOCK(srli_epi16)(p, 1), w);
}

template <bool kSigns>
ALWAYS_INLINE inline Block mixed_block(const uint8_t* const* rows, const uint16_t* w, int taps,
                                       int64_t x) {
  const Block zero = words(0);
  Block low = words(kSigns ? 32 : rounding(taps)), high = low;
  for (int k = 0; k < taps; ++k) {
    const Block p = load_block(rows[k] + x), weight = words(w[k]);
    low = OF_BLOCK(add_epi16)(low, product<kSigns>(OF_BLOCK(unpacklo_epi8)(zero, p), weight));
    high = OF_BLOCK(add_epi16)(high, product<kSigns>(OF_BLOCK(unpackhi_epi8)(zero, p), weight));
  }
  if (!kSigns)
    return OF_BLOCK(packus_epi16)(OF_BLOCK(srli_epi16)(low, 8), OF_BLOCK(srli_epi16)(high, 8));
  return OF_BLOCK(packus_epi16)(OF_BLOCK(srai_epi16)(low, 6), OF_BLOCK(srai_epi16)(high, 6));
}

template <bool kSigns>
ALWAYS_INLINE inline void mix_blocks(const uint8_t* const* rows, const uint16_t* w, int taps,
                                     int64_t bytes, uint8_t* to) {
  int64_t x = 0;
  for (; x + kBytes <= bytes; x += kBytes)
    store_block(to + x, mixed_block<kSigns>(rows, w, taps, x));
  // The last one begins earlier rather than read beyond the row.
  const int64_t last = bytes - kBytes;
  if (x < bytes) store_block(to + last, mixed_block<kSigns>(rows, w, taps, last));
}
#endif

// `bytes` bytes of several rows, weighted.
inline void mix_rows(const uint8_t* const* rows, const uint16_t* w, int taps, bool with_signs,
                     int64_t bytes, uint8_t* to) {
  if (taps == 1) {
    memcpy(to, rows[0], size_t(bytes));
    return;
  }
#if defined(__AVX2__)
  if (bytes >= kBytes) {
    if (with_signs) return mix_blocks<true>(rows, w, taps, bytes, to);
    if (taps == 2) return mix_blocks<false>(rows, w, 2, bytes, to);
    if (taps == 3) return mix_blocks<false>(rows, w, 3, bytes, to);
    if (taps == 4) return mix_blocks<false>(rows, w, 4, bytes, to);
    return mix_blocks<false>(rows, w, taps, bytes, to);
  }
#endif
  for (int64_t x = 0; x < bytes; ++x) to[x] = mixed_byte(rows, w, taps, with_signs, x);
}

// r g b r g b ... -> planes. Reads and writes up to 48 bytes more than there are.
inline void separate(const uint8_t* from, int64_t pixels, uint8_t* const* planes) {
#if defined(__AVX2__)
  // Pixel i has its colour c at 3 i + c: in the first, second or third 16 bytes.
  alignas(16) static const int8_t kMasks[3][3][16] = {
      {{0, 3, 6, 9, 12, 15, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1},
       {-1, -1, -1, -1, -1, -1, 2, 5, 8, 11, 14, -1, -1, -1, -1, -1},
       {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 1, 4, 7, 10, 13}},
      {{1, 4, 7, 10, 13, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1},
       {-1, -1, -1, -1, -1, 0, 3, 6, 9, 12, 15, -1, -1, -1, -1, -1},
       {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 2, 5, 8, 11, 14}},
      {{2, 5, 8, 11, 14, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1},
       {-1, -1, -1, -1, -1, 1, 4, 7, 10, 13, -1, -1, -1, -1, -1, -1},
       {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 3, 6, 9, 12, 15}}};
  const auto part = [](const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); };
  for (int64_t i = 0; i < pixels; i += 16, from += 48) {
    const __m128i a = part(from), b = part(from + 16), c = part(from + 32);
    for (int plane = 0; plane < 3; ++plane) {
      const auto& mask = kMasks[plane];
      const __m128i v = _mm_or_si128(
          _mm_or_si128(_mm_shuffle_epi8(a, part(mask[0])), _mm_shuffle_epi8(b, part(mask[1]))),
          _mm_shuffle_epi8(c, part(mask[2])));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(planes[plane] + i), v);
    }
  }
#else
  for (int64_t i = 0; i < pixels; ++i)
    for (int plane = 0; plane < 3; ++plane) planes[plane][i] = from[3 * i + plane];
#endif
}

// ------------------------------------------------------------ columns: the horizontal direction

constexpr float kColumnScale = 1.0f / 16384;

inline void pack_columns(const AugmentColumns& c, int64_t width) {
  const int pairs = c.taps / 2;
  for (int64_t group = 0; group < width; group += 4) {
    int32_t base = c.start[group];
    for (int64_t i = group; i < group + 4 && i < width; ++i)
      base = c.start[i] < base ? c.start[i] : base;
    c.bases[group / 4] = base;
    const int64_t vector = group / kLanes, lane = group % kLanes;
    for (int k = 0; k < pairs; ++k) {
      uint8_t* mask = c.masks + ((vector * pairs + k) * kLanes + lane) * 4;
      int16_t* weights = c.pairs + ((vector * pairs + k) * kLanes + lane) * 2;
      for (int64_t i = 0; i < 4; ++i) {
        const bool there = group + i < width;
        const int at = there ? c.start[group + i] - base + 2 * k : 0;
        mask[4 * i] = uint8_t(at);
        mask[4 * i + 1] = mask[4 * i + 3] = 0x80;
        mask[4 * i + 2] = uint8_t(at + 1);
        weights[2 * i] = there ? c.weights[(group + i) * c.taps + 2 * k] : int16_t(0);
        weights[2 * i + 1] = there ? c.weights[(group + i) * c.taps + 2 * k + 1] : int16_t(0);
      }
    }
  }
}

#if defined(__AVX2__)
// Four columns for each 16 bytes of a register.
ALWAYS_INLINE inline Block four_by_four(const uint8_t* plane, const int32_t* bases) {
  const auto part = [&](int i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(plane + bases[i]));
  };
#if defined(__AVX512F__)
  Block v = _mm512_castsi128_si512(part(0));
  v = _mm512_inserti32x4(v, part(1), 1);
  v = _mm512_inserti32x4(v, part(2), 2);
  return _mm512_inserti32x4(v, part(3), 3);
#else
  return _mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(1), 1);
#endif
}

// f(first column, vectors of the channels) for every vector of columns.
template <int kPairs, int kChannels, class F>
ALWAYS_INLINE inline void each_window(const AugmentColumns& c, int64_t width,
                                      uint8_t* const* bytes, F&& f) {
  for (int64_t x = 0; x < width; x += kLanes) {
    const int32_t* bases = c.bases + x / 4;
    const uint8_t* masks = c.masks + x * kPairs * 4;
    const uint8_t* pairs = reinterpret_cast<const uint8_t*>(c.pairs + x * kPairs * 2);
    Vec pixels[kChannels];
    for (int channel = 0; channel < kChannels; ++channel) {
      const Block v = four_by_four(bytes[channel], bases);
      Block sum = words(0);
      for (int k = 0; k < kPairs; ++k) {
        const Block picked = OF_BLOCK(shuffle_epi8)(v, load_block(masks + k * kBytes));
        const Block weights = load_block(pairs + k * kBytes);
        sum = OF_BLOCK(add_epi32)(sum, OF_BLOCK(madd_epi16)(picked, weights));
      }
      pixels[channel] = (Vec)OF_BLOCK(cvtepi32_ps)(sum) * kColumnScale;
    }
    f(x, pixels);
  }
}

template <int kPairs, int kChannels>
ALWAYS_INLINE inline void mix_windows(const AugmentColumns& c, int64_t width,
                                      uint8_t* const* bytes, float* const* planes) {
  each_window<kPairs, kChannels>(c, width, bytes, [&](int64_t x, const Vec* v) ALWAYS_INLINE {
    for (int channel = 0; channel < kChannels; ++channel)
      store<F32>(planes[channel] + x, v[channel]);
  });
}
#endif

inline void mix_columns(const AugmentColumns& c, int channels, int64_t width, uint8_t* const* bytes,
                        float* const* planes) {
#if defined(__AVX2__)
  if (c.windows && channels == 3) {
    if (c.taps == 2) return mix_windows<1, 3>(c, width, bytes, planes);
    if (c.taps == 4) return mix_windows<2, 3>(c, width, bytes, planes);
    if (c.taps == 6) return mix_windows<3, 3>(c, width, bytes, planes);
  }
  if (c.windows && channels == 1) {
    if (c.taps == 2) return mix_windows<1, 1>(c, width, bytes, planes);
    if (c.taps == 4) return mix_windows<2, 1>(c, width, bytes, planes);
    if (c.taps == 6) return mix_windows<3, 1>(c, width, bytes, planes);
  }
#endif
  for (int channel = 0; channel < channels; ++channel)
    for (int64_t x = 0; x < width; ++x) {
      const uint8_t* from = bytes[channel] + c.start[x];
      const int16_t* w = c.weights + x * c.taps;
      int sum = 0;
      for (int k = 0; k < c.taps; ++k) sum += from[k] * w[k];
      planes[channel][x] = float(sum) * kColumnScale;
    }
}

// What lies outside shows `fill`; cover is the share that is inside.
ALWAYS_INLINE inline void cover_row(const float* cover, float more, float fill, int64_t width,
                                    float* plane) {
  for (int64_t x = 0; x < width; x += kLanes) {
    const Vec share = load<F32>(cover + x) * more, v = load<F32>(plane + x);
    store<F32>(plane + x, fma(v - fill, share, splat(fill)));
  }
}

// The bytes of a row of the output, before its columns are mixed, in scratch.planes.
inline void mixed_row(const AugmentAxes& a, int64_t row, const AugmentScratch& scratch) {
  const AugmentImage& s = a.source;
  const int taps = a.rows.taps[row];
  const uint16_t* weights = a.rows.weights + row * a.rows.most;
  const bool interleaved = s.pixel > 1;
  const int64_t bytes = a.columns.count * s.pixel;
  const uint8_t* from[512];
  for (int channel = 0; channel < (interleaved ? 1 : a.channels); ++channel) {
    const uint8_t* first = s.at + channel * s.plane + a.rows.start[row] * s.row;
    for (int k = 0; k < taps; ++k) from[k] = first + k * s.row + a.columns.first * s.pixel;
    mix_rows(from, weights, taps, a.with_signs, bytes,
             interleaved ? scratch.row : scratch.planes[channel]);
  }
  if (interleaved) separate(scratch.row, a.columns.count, scratch.planes);
}

inline void axes_row(const AugmentAxes& a, int64_t row, const AugmentScratch& scratch,
                     float* const* planes) {
  mixed_row(a, row, scratch);
  mix_columns(a.columns, a.channels, a.width, scratch.planes, planes);
  if (a.with_signs)  // bicubic overshoots
    for (int channel = 0; channel < a.channels; ++channel)
      for (int64_t x = 0; x < a.width; x += kLanes)
        store<F32>(planes[channel] + x, within_bytes(load<F32>(planes[channel] + x)));
  if (a.covered)
    for (int channel = 0; channel < a.channels; ++channel)
      cover_row(a.cover_x, a.cover_y[row], a.fill[channel], a.width, planes[channel]);
}

}  // namespace
