// Element types and the vector type that every CPU kernel is written in.
//
// A kernel body is written once, against `Vec` (one register of floats), and compiled once per
// instruction set: GCC's and Clang's vector extension turns the same arithmetic into SSE2 or NEON
// (portable), AVX2 or AVX-512. Only conversions, the square root and the fused multiply-add need
// intrinsics.
//
// Everything here sits in an anonymous namespace, and the files compiled with -mavx2 or -mavx512*
// use no inline function or template of the standard library. Otherwise the linker could keep, of
// several identical weak symbols, the copy that was compiled for AVX-512, and portable code calling
// it would die with SIGILL on an older CPU.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// The codes that Python passes (gradsmith_kernels/ops/common/native.py holds the same table).
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));

inline Vec splat(float value) { return value - Vec{}; }

// a * b + c, rounded once where the instruction set has FMA.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline Vec square_root(Vec v) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(v);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// The lanes' sum, always in the same order.
inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}

// IEEE binary16 -> binary32 in integer arithmetic, for CPUs without F16C.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  uint32_t exponent = (h >> 10) & 0x1f, mantissa = h & 0x3ff, out;
  if (exponent == 0x1f) {
    out = sign | 0x7f800000 | (mantissa << 13);
  } else if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in binary32
    float value = float(mantissa) * 0x1p-24f;
    memcpy(&out, &value, 4);
    out |= sign;
  } else {
    out = sign | ((exponent + 112) << 23) | (mantissa << 13);
  }
  float result;
  memcpy(&result, &out, 4);
  return result;
}

// binary32 -> binary16, to nearest even; overflow gives infinity, NaN stays NaN.
inline uint16_t float_to_half(float value) {
  uint32_t u;
  memcpy(&u, &value, 4);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (u >= 0x47800000) return uint16_t(sign | 0x7c00);  // 65536 and above
  if (u < 0x38800000) {
    // Below 2^-14 the result is subnormal: adding 0.5 leaves the rounded mantissa in the low bits.
    float magnitude;
    memcpy(&magnitude, &u, 4);
    magnitude += 0.5f;
    memcpy(&u, &magnitude, 4);
    return uint16_t(sign | (u - 0x3f000000));
  }
  u += 0xfff + ((u >> 13) & 1);  // may carry into the exponent, up to infinity, as it should
  return uint16_t(sign | ((u - 0x38000000) >> 13));
}

struct F32 {
  using T = float;
  using Packed = Vec;
  static Packed narrow(Vec v) { return v; }
  static Vec widen(Packed p) { return p; }
};

struct BF16 {
  using T = uint16_t;
  using Packed = Half;

  // To nearest even, NaN kept.
  static Packed narrow(Vec v) {
#if defined(__AVX512BF16__)
    // The instruction flushes subnormal numbers to zero. They are rare, but bits that depend on the
    // CPU are worse than a branch: vectors which hold one go the long way.
    if (__builtin_expect(_mm512_fpclass_ps_mask(v, 0x20) == 0, 1))
      return (Half)_mm512_cvtneps_pbh(v);
#endif
    const Bits u = reinterpret_cast<Bits>(v);
    const Bits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const Bits out = (u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : rounded;
#if defined(__AVX512F__)
    return (Half)_mm512_cvtepi32_epi16((__m512i)out);
#elif defined(__AVX2__)
    const __m256i packed = _mm256_packus_epi32((__m256i)out, (__m256i)out);
    return (Half)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xd8));
#else
    return __builtin_convertvector(out, Half);
#endif
  }

  static Vec widen(Packed p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)p), 16);
#elif defined(__AVX2__)
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)p), 16);
#else
    return reinterpret_cast<Vec>(__builtin_convertvector(p, Bits) << 16);
#endif
  }
};

struct F16 {
  using T = uint16_t;
  using Packed = Half;

  static Packed narrow(Vec v) {
#if defined(__AVX512F__)
    return (Half)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return (Half)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    Half out;
    for (int i = 0; i < kLanes; ++i) out[i] = float_to_half(v[i]);
    return out;
#endif
  }

  static Vec widen(Packed p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps((__m256i)p);
#elif defined(__AVX2__)
    return _mm256_cvtph_ps((__m128i)p);
#else
    Vec out;
    for (int i = 0; i < kLanes; ++i) out[i] = half_to_float(p[i]);
    return out;
#endif
  }
};

// Loads and stores `count` elements; the other lanes read as zero and are not written. So a row's
// tail goes through the very same arithmetic as its body, where `count` is a constant that folds
// away: but only if all on the way is inlined, else every vector becomes a call of memcpy.
#define ALWAYS_INLINE __attribute__((always_inline))

#if defined(__AVX512F__)
// A copy of a count that is not known would be a call, and reading it back as a vector would wait
// for its stores.
ALWAYS_INLINE inline Vec load_some(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
}
ALWAYS_INLINE inline Half load_some(const uint16_t* from, int64_t count) {
  return (Half)_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), from);
}
ALWAYS_INLINE inline void store_some(float* to, Vec v, int64_t count) {
  _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), v);
}
ALWAYS_INLINE inline void store_some(uint16_t* to, Half v, int64_t count) {
  _mm256_mask_storeu_epi16(to, __mmask16((1u << count) - 1), (__m256i)v);
}
#endif

template <class D>
ALWAYS_INLINE inline Vec load(const typename D::T* from, int64_t count = kLanes) {
  typename D::Packed packed{};
#if defined(__AVX512F__)
  if (!__builtin_constant_p(count)) return D::widen(load_some(from, count));
#endif
  memcpy(&packed, from, size_t(count) * sizeof(typename D::T));
  return D::widen(packed);
}

template <class D>
ALWAYS_INLINE inline void store(typename D::T* to, Vec v, int64_t count = kLanes) {
  const typename D::Packed packed = D::narrow(v);
#if defined(__AVX512F__)
  if (!__builtin_constant_p(count)) return store_some(to, packed, count);
#endif
  memcpy(to, &packed, size_t(count) * sizeof(typename D::T));
}

}  // namespace
