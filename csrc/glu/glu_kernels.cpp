// levels: portable avx2 avx512 avx512bf16
#include "common/elements.h"
#include "common/level.h"
#include "common/math.h"
#include "glu/glu.h"

namespace {

// Whether results are rounded to 16 bits, which hides small errors.
template <class X>
constexpr bool kCoarse = sizeof(typename X::T) == 2;

template <class X>
ALWAYS_INLINE inline Vec power_of_e(Vec x) {
  if constexpr (kCoarse<X>) return coarse_power_of_two(x * 1.4426950408889634f);
  return exponential(x);
}

// 1 / x for x >= 1; for 16 bits with a relative error of 2^-14.
template <class X>
ALWAYS_INLINE inline Vec inverse(Vec x) {
#if defined(__AVX512F__)
  if constexpr (kCoarse<X>) return _mm512_rcp14_ps(x);
#endif
  return 1.0f / x;
}

// An activation and its derivative: an exponential and a quotient. No value comes from a difference
// that cancels, so far below 0 it has as many correct digits as elsewhere.
struct Activated {
  Vec value, slope;
};

struct Silu {
  // With s = 1 / (1 + e^-x):  x * s, and s + x * s * (1 - s).
  template <class X>
  ALWAYS_INLINE static Activated of(Vec x) {
    const Vec below = 1.0f + power_of_e<X>(-x), s = inverse<X>(below);
    // A product that is rounded twice is good enough for 16 bits, and saves a division.
    const Vec value = kCoarse<X> ? x * s : x / below;
    return {value, fma(value, 1.0f - s, s)};
  }
};

// gelu is x times a symmetric distribution's share below x. `tail`: that share below -|x|.
// `density`: its derivative.
ALWAYS_INLINE inline Activated gelu(Vec x, Vec tail, Vec density) {
  const Vec share = x < 0.0f ? tail : 1.0f - tail;
  return {x * share, fma(x, density, share)};
}

struct Gelu {
  // The normal distribution's tail over e^(-a^2 / 2), erfc(a / sqrt(2)) / 2 * e^(a^2 / 2), for
  // a >= 0: a polynomial in t = 1 / (1 + c * a), fitted up to a = 14.5, where the tail is no normal
  // number any more. Relative error 4e-8; for 16 bits 6e-6, without t's.
  template <class X>
  ALWAYS_INLINE static Vec scaled_tail(Vec a) {
    if constexpr (kCoarse<X>) {
      const Vec t = inverse<X>(fma(a, splat(0.3125f), splat(1.0f)));
      Vec p = fma(splat(-0.07201012969017029f), t, splat(0.16927309334278107f));
      p = fma(p, t, splat(0.025694603100419044f));
      p = fma(p, t, splat(0.12997987866401672f));
      p = fma(p, t, splat(0.12226271629333496f));
      return t * fma(p, t, splat(0.12479690462350845f));
    }
    const Vec t = inverse<X>(fma(a, splat(0.3375f), splat(1.0f)));
    Vec p = fma(splat(-0.024667415767908096f), t, splat(0.13494393229484558f));
    p = fma(p, t, splat(-0.27076664566993713f));
    p = fma(p, t, splat(0.20639783143997192f));
    p = fma(p, t, splat(-0.046410635113716125f));
    p = fma(p, t, splat(0.11641494184732437f));
    p = fma(p, t, splat(0.1143278256058693f));
    p = fma(p, t, splat(0.13513803482055664f));
    return t * fma(p, t, splat(0.13462215662002563f));
  }

  template <class X>
  ALWAYS_INLINE static Activated of(Vec x) {
    const Vec power = power_of_e<X>(x * x * -0.5f);
    const Vec tail = scaled_tail<X>(magnitude(x)) * power;
    return gelu(x, tail, power * 0.3989422804014327f);  // 1 / sqrt(2 * pi)
  }
};

struct GeluTanh {
  // The share (1 + tanh(u)) / 2 = 1 / (1 + e^-2u), with u = sqrt(2 / pi) * (x + 0.044715 * x^3).
  template <class X>
  ALWAYS_INLINE static Activated of(Vec x) {
    const Vec size = magnitude(x);
    const Vec a = size > 20.0f ? splat(20.0f) : size;  // the tail is 0 there, and u is finite
    const Vec square = a * a, power = power_of_minus_2u<X>(a, square);
    const Vec tail = power / (1.0f + power);
    const Vec slope = fma(square, splat(0.21406444881780074f), splat(1.5957691216057308f));  // 2u'
    return gelu(x, tail, tail * (1.0f - tail) * slope);
  }

  // e^-2u; both coefficients hold log2(e). The product's rounding would be the power's error, so it
  // goes into the power as well.
  template <class X>
  ALWAYS_INLINE static Vec power_of_minus_2u(Vec a, Vec square) {
    const Vec factor = fma(square, splat(-0.1029432395800235f), splat(-2.302208198144325f));
    const Vec exponent = a * factor;
    if constexpr (kCoarse<X>) return coarse_power_of_two(exponent);
    const Vec n = round(exponent), rest = fma(a, factor, -exponent);
    return scale_by_power(power_of_two((exponent - n) + rest), n);
  }
};

// f(row, first column, columns) for each of the blocks [begin, end).
template <class F>
ALWAYS_INLINE inline void each_block(int64_t cols, int64_t begin, int64_t end, F&& f) {
  const int64_t of_row = glu_blocks_of_row(cols);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block % of_row * kGluBlock;
    f(block / of_row, first, cols - first < kGluBlock ? cols - first : kGluBlock);
  }
}

template <class A, class X>
struct Kernels {
  using T = typename X::T;

  static void forward(const GluForward& a, int64_t begin, int64_t end) {
    each_block(a.cols, begin, end, [&](int64_t row, int64_t first, int64_t count) ALWAYS_INLINE {
      const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + first;
      const T* up = static_cast<const T*>(a.up) + row * a.up_stride + first;
      T* y = static_cast<T*>(a.y) + row * a.cols + first;
      each_vector(count, [&](int64_t j, int64_t n) ALWAYS_INLINE {
        store<X>(y + j, A::template of<X>(load<X>(gate + j, n)).value * load<X>(up + j, n), n);
      });
    });
  }

  static void backward(const GluBackward& a, int64_t begin, int64_t end) {
    each_block(a.cols, begin, end, [&](int64_t row, int64_t first, int64_t count) ALWAYS_INLINE {
      const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride + first;
      const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + first;
      const T* up = static_cast<const T*>(a.up) + row * a.up_stride + first;
      T* dgate = a.dgate ? static_cast<T*>(a.dgate) + row * a.cols + first : nullptr;
      T* dup = a.dup ? static_cast<T*>(a.dup) + row * a.cols + first : nullptr;
      each_vector(count, [&](int64_t j, int64_t n) ALWAYS_INLINE {
        const Activated activated = A::template of<X>(load<X>(gate + j, n));
        const Vec d = load<X>(dy + j, n);
        if (dgate) store<X>(dgate + j, d * load<X>(up + j, n) * activated.slope, n);
        if (dup) store<X>(dup + j, d * activated.value, n);
      });
    });
  }
};

template <class A, class F>
void with_dtype(int dtype, F&& f) {
  if (dtype == kFloat32)
    f(Kernels<A, F32>{});
  else if (dtype == kBFloat16)
    f(Kernels<A, BF16>{});
  else
    f(Kernels<A, F16>{});
}

template <class F>
void with_kernels(int activation, int dtype, F&& f) {
  if (activation == kSilu)
    with_dtype<Silu>(dtype, f);
  else if (activation == kGelu)
    with_dtype<Gelu>(dtype, f);
  else
    with_dtype<GeluTanh>(dtype, f);
}

void forward(const GluForward& a, int activation, int dtype, int64_t begin, int64_t end) {
  with_kernels(activation, dtype, [&](auto kernels) { kernels.forward(a, begin, end); });
}

void backward(const GluBackward& a, int activation, int dtype, int64_t begin, int64_t end) {
  with_kernels(activation, dtype, [&](auto kernels) { kernels.backward(a, begin, end); });
}

}  // namespace

const GluKernels AT_LEVEL(glu) = {forward, backward};
