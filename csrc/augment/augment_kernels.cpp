// levels: portable avx2 avx512 avx512bf16
#include "augment/mapping.h"
#include "common/elements.h"
#include "common/level.h"

namespace {

// x^y for x in [0, 1], y >= 0; 0^0 is 1.
ALWAYS_INLINE inline Vec power(Vec x, float y) {
  const Vec tiny = splat(1e-30f), v = max(x, tiny);
  // v = 2^e * m with m in [sqrt(1/2), sqrt(2)), log(m) = 2 artanh((m - 1) / (m + 1))
  const Ints bits = (Ints)v - 0x3f3504f3;
  const Vec e = __builtin_convertvector(bits >> 23, Vec);
  const Vec m = (Vec)((bits & 0x7fffff) + 0x3f3504f3);
  const Vec s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  Vec p = fma(splat(0.4121985831f), s2, splat(0.5770780164f));  // 2 / ln(2) times 1/7, 1/5, 1/3, 1
  p = fma(p, s2, splat(0.9617966940f));
  p = fma(p, s2, splat(2.8853900818f));
  const Vec logarithm = fma(p, s, e) * y, whole = round(logarithm);
  const Vec result = scale_by_power(power_of_two(logarithm - whole), whole);
  return x < tiny ? splat(y == 0.0f ? 1.0f : 0.0f) : result;
}

// An op on the vectors of the channels at column x; what comes after a row's end does not count.
template <int kChannels>
ALWAYS_INLINE inline void pixel_op(const AugmentPixelOp& op, int64_t x, Vec* v) {
  switch (op.op) {
    case kAffine: {
      const bool bounded = op.p[6] != 0;
      for (int c = 0; c < kChannels; ++c) {
        v[c] = fma(v[c], splat(op.p[c]), splat(op.p[3 + c]));
        if (bounded) v[c] = clamped(v[c], 0.0f, 255.0f);
      }
      break;
    }
    case kSaturation:
      if constexpr (kChannels == 3) saturate(v[0], v[1], v[2], op.p[0]);
      break;
    case kHue:
      if constexpr (kChannels == 3) shift_hue(v[0], v[1], v[2], op.p[0]);
      break;
    case kSolarize:
      for (int c = 0; c < kChannels; ++c) v[c] = solarized(v[c], op.p[0]);
      break;
    case kPosterize:
      for (int c = 0; c < kChannels; ++c)
        v[c] = floor(round(v[c]) * (1.0f / op.p[0])) * op.p[0];
      break;
    case kGamma:
      for (int c = 0; c < kChannels; ++c)
        v[c] = clamped(power(v[c] * (1.0f / 255), op.p[0]) * (255 * op.p[1]), 0.0f, 255.0f);
      break;
    case kTable:
      for (int c = 0; c < kChannels; ++c) {
        const Ints at = __builtin_convertvector(clamped(round(v[c]), 0.0f, 255.0f), Ints);
        const float* const table = op.table + 256 * c;
#if defined(__AVX512F__)
        v[c] = (Vec)_mm512_i32gather_ps((__m512i)at, table, 4);
#elif defined(__AVX2__)
        v[c] = (Vec)_mm256_i32gather_ps(table, (__m256i)at, 4);
#else
        for (int i = 0; i < kLanes; ++i) v[c][i] = table[at[i]];
#endif
      }
      break;
    default:
      (void)x;
  }
}

// Random numbers of 16 bits, eight to a counter: the place, the step, which eight of the image.
inline void add_noise(const AugmentPixelOp& op, int channels, int64_t row, int64_t width,
                      float* const* planes) {
  for (int c = 0; c < channels; ++c) {
    Random words{};
    for (int64_t x = 0; x < width; ++x) {
      const uint64_t element = uint64_t((c * op.height + row) * width + x);
      const int part = int(element & 7);
      if (part == 0 || x == 0)
        words = philox({{uint32_t(op.place), uint32_t(op.place >> 32), uint32_t(op.stream),
                         uint32_t(element >> 3)}},
                       op.seed);
      const uint32_t bits = words.word[part >> 1] >> (part & 1 ? 16 : 0) & 65535;
      float v = planes[c][x] + op.p[0] + op.p[1] * op.table[bits];
      if (op.p[2] != 0) v = within_bytes(v);
      planes[c][x] = v;
    }
  }
}

inline void erase(const AugmentPixelOp& op, int channels, int64_t row, float* const* planes) {
  if (float(row) < op.p[0] || float(row) >= op.p[2]) return;
  for (int c = 0; c < channels; ++c)
    for (int64_t x = int64_t(op.p[1]); x < int64_t(op.p[3]); ++x) planes[c][x] = op.p[4 + c];
}

ALWAYS_INLINE inline bool of_the_row(const AugmentPixelOp& op) {
  return op.op == kNoise || op.op == kErase;
}

template <int kChannels>
inline void pixels_of(const AugmentPixelOp* ops, int count, int64_t row, int64_t width,
                      float* const* planes) {
  for (int first = 0; first < count;) {
    if (of_the_row(ops[first])) {
      if (ops[first].op == kNoise)
        add_noise(ops[first], kChannels, row, width, planes);
      else
        erase(ops[first], kChannels, row, planes);
      ++first;
      continue;
    }
    int end = first;  // these go through together, while the pixels are in registers
    while (end < count && !of_the_row(ops[end])) ++end;
    for (int64_t x = 0; x < width; x += kLanes) {
      Vec v[kChannels];
      for (int c = 0; c < kChannels; ++c) v[c] = load<F32>(planes[c] + x);
      for (int k = first; k < end; ++k) pixel_op<kChannels>(ops[k], x, v);
      for (int c = 0; c < kChannels; ++c) store<F32>(planes[c] + x, v[c]);
    }
    first = end;
  }
}

void pixels(const AugmentPixelOp* ops, int count, int channels, int64_t row, int64_t width,
            float* const* planes) {
  if (channels == 3)
    pixels_of<3>(ops, count, row, width, planes);
  else
    pixels_of<1>(ops, count, row, width, planes);
}

float gray_sum(float* const* planes, int channels, int64_t width) {
  Vec total = splat(0.0f);
  float rest = 0;
  int64_t x = 0;
  for (; x + kLanes <= width; x += kLanes) {
    const Vec first = load<F32>(planes[0] + x);
    total += channels == 1
                 ? first
                 : gray_of(first, load<F32>(planes[1] + x), load<F32>(planes[2] + x));
  }
  for (; x < width; ++x)
    rest += channels == 1 ? planes[0][x] : gray_of(planes[0][x], planes[1][x], planes[2][x]);
  return sum(total) + rest;
}

void range(const float* plane, int64_t width, float* low, float* high) {
  float least_seen = *low, most_seen = *high;
  for (int64_t x = 0; x < width; ++x) {
    least_seen = least(least_seen, plane[x]);
    most_seen = most(most_seen, plane[x]);
  }
  *low = least_seen;
  *high = most_seen;
}

void weighted_rows(const float* const* rows, const float* weights, int taps, int64_t width,
                   float* to) {
  for (int64_t x = 0; x < width; x += kLanes) {
    Vec total = splat(0.0f);
    for (int k = 0; k < taps; ++k)
      total = fma(load<F32>(rows[k] + x), splat(weights[k]), total);
    store<F32>(to + x, total);
  }
}

void weighted_columns(const float* from, const float* weights, int taps, int64_t width,
                      float* to) {
  for (int64_t x = 0; x < width; x += kLanes) {
    Vec total = splat(0.0f);
    for (int k = 0; k < taps; ++k)
      total = fma(load<F32>(from + x + k), splat(weights[k]), total);
    store<F32>(to + x, total);
  }
}

void blend(const float* x, float a, const float* y, float b, int64_t width, float* to) {
  for (int64_t i = 0; i < width; i += kLanes)
    store<F32>(to + i,
               clamped(fma(load<F32>(x + i), splat(a), load<F32>(y + i) * b), 0.0f, 255.0f));
}

template <class D>
ALWAYS_INLINE inline void store_as(const float* plane, int64_t width, void* to) {
  typename D::T* const out = static_cast<typename D::T*>(to);
  int64_t x = 0;
  for (; x + kLanes <= width; x += kLanes) store<D>(out + x, load<F32>(plane + x));
  if (x < width) store<D>(out + x, load<F32>(plane + x, width - x), width - x);
}

void store_row(const float* plane, int64_t width, void* to, int dtype) {
  if (dtype == kFloat32) return store_as<F32>(plane, width, to);
  if (dtype == kBFloat16) return store_as<BF16>(plane, width, to);
  if (dtype == kFloat16) return store_as<F16>(plane, width, to);
  uint8_t* const out = static_cast<uint8_t*>(to);
  for (int64_t x = 0; x < width; x += kLanes) {
    const Ints whole =
        __builtin_convertvector(clamped(round(load<F32>(plane + x)), 0.0f, 255.0f), Ints);
    const int64_t count = width - x < kLanes ? width - x : kLanes;
#if defined(__AVX512F__)
    const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)whole);
    if (count == kLanes)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + x), bytes);
    else
      _mm_mask_storeu_epi8(out + x, __mmask16((1u << count) - 1), bytes);
#else
    for (int64_t i = 0; i < count; ++i) out[x + i] = uint8_t(whole[i]);
#endif
  }
}

#if defined(__AVX2__)
template <class D, int kPairs>
inline void whole_row_as(const AugmentAxes& a, const AugmentScratch& scratch,
                         const AugmentPixelOp* ops, int count, void* const* outputs) {
  each_window<kPairs, 3>(
      a.columns, a.width, scratch.planes, [&](int64_t x, const Vec* sampled) ALWAYS_INLINE {
        Vec v[3] = {sampled[0], sampled[1], sampled[2]};
        for (int k = 0; k < count; ++k) pixel_op<3>(ops[k], x, v);
        for (int c = 0; c < 3; ++c) {
          typename D::T* const out = static_cast<typename D::T*>(outputs[c]) + x;
          if (x + kLanes <= a.width)
            store<D>(out, v[c]);
          else
            store<D>(out, v[c], a.width - x);
        }
      });
}

template <class D>
inline void whole_row_of(const AugmentAxes& a, const AugmentScratch& scratch,
                         const AugmentPixelOp* ops, int count, void* const* outputs) {
  if (a.columns.taps == 2) return whole_row_as<D, 1>(a, scratch, ops, count, outputs);
  if (a.columns.taps == 4) return whole_row_as<D, 2>(a, scratch, ops, count, outputs);
  whole_row_as<D, 3>(a, scratch, ops, count, outputs);
}
#endif

bool whole_row(const AugmentAxes& a, int64_t row, const AugmentScratch& scratch,
               const AugmentPixelOp* ops, int count, void* const* outputs, int dtype) {
#if defined(__AVX2__)
  if (!a.columns.windows || a.channels != 3 || a.with_signs || a.covered || dtype > kFloat16)
    return false;
  for (int k = 0; k < count; ++k)
    if (of_the_row(ops[k])) return false;
  mixed_row(a, row, scratch);
  if (dtype == kFloat32)
    whole_row_of<F32>(a, scratch, ops, count, outputs);
  else if (dtype == kBFloat16)
    whole_row_of<BF16>(a, scratch, ops, count, outputs);
  else
    whole_row_of<F16>(a, scratch, ops, count, outputs);
  return true;
#else
  (void)a, (void)row, (void)scratch, (void)ops, (void)count, (void)outputs, (void)dtype;
  return false;
#endif
}

template <class D>
inline void mix_as(void* x, void* y, float keep, int64_t elements) {
  typename D::T* const a = static_cast<typename D::T*>(x);
  typename D::T* const b = static_cast<typename D::T*>(y);
  const Vec own = splat(keep), other = splat(1 - keep);
  each_vector(elements, [&](int64_t i, int64_t n) ALWAYS_INLINE {
    const Vec u = load<D>(a + i, n), v = load<D>(b + i, n);
    store<D>(a + i, fma(u, own, v * other), n);
    store<D>(b + i, fma(v, own, u * other), n);
  });
}

void mix(void* x, void* y, float keep, int64_t elements, int dtype) {
  if (dtype == kFloat32) return mix_as<F32>(x, y, keep, elements);
  if (dtype == kBFloat16) return mix_as<BF16>(x, y, keep, elements);
  mix_as<F16>(x, y, keep, elements);
}

}  // namespace

const AugmentKernels AT_LEVEL(augment) = {
    kLanes, pack_columns,  axes_row,         map_row, pixels,    gray_sum,
    range,  weighted_rows, weighted_columns, blend,   store_row, whole_row, mix};
