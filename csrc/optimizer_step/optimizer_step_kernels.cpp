// levels: portable avx2 avx512 avx512bf16
// A body is instantiated for each rule, with all tensors in float32 and with dtypes that are asked
// for at each vector (common/elements.h). 8-bit states are decoded a block at a time into a buffer
// of floats in the L1 cache.
#include "common/elements.h"
#include "common/level.h"
#include "optimizer_step/eight_bit.h"
#include "optimizer_step/optimizer_step.h"

namespace {

// ------------------------------------------------------------------------------- random bits

// A bijection of 32 bits whose output passes for random: multiply and shift, twice, with the
// constants of Wellons' search ("lowbias32", public domain).
template <class T>
ALWAYS_INLINE inline T mix(T x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// The random bits of element j and its neighbours: a function of the key and the index alone.
ALWAYS_INLINE inline Bits random_bits(uint32_t key, int64_t j) {
  Bits lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = uint32_t(i);
  const uint32_t high = uint32_t(uint64_t(j) >> 32) * 0x9e3779b9u;
  return mix((lanes + uint32_t(j)) ^ (key + high));
}

// float32 -> bfloat16, up or down with odds by nearness: `random` holds bits below 2^16.
inline Vec round_randomly(Vec v, Bits random) {
  const Bits u = (Bits)v;
  const Bits finite = (u & 0x7f800000u) != 0x7f800000u;
  return (Vec)((u + (random & finite)) & (0xffff0000u | ~finite));
}

// ------------------------------------------------------------------------------------- rules

// A rule updates the weight x and its states from the gradient g; c are the tensor's coefficients,
// c[6] the L2 decay, c[7] the L1 threshold for every rule.
struct Coefficients {
  Vec c0, c1, c2, c3, c4, c5, c6, c7;
  explicit Coefficients(const float* c)
      : c0(splat(c[0])), c1(splat(c[1])), c2(splat(c[2])), c3(splat(c[3])), c4(splat(c[4])),
        c5(splat(c[5])), c6(splat(c[6])), c7(splat(c[7])) {}
};

// Where `share` has its sign bit set, b, else a.
ALWAYS_INLINE inline Vec base_of(Vec share, Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)share), a, b);
#elif defined(__AVX2__)
  return _mm256_blendv_ps(a, b, share);
#else
  return (Ints)share < 0 ? b : a;
#endif
}

// beta * average + (1 - beta) * value. `share` is 1 - beta where beta is above a half, else -beta
// (-0 too), and the sum then starts from the value: neither side is lost to the other's rounding.
ALWAYS_INLINE inline Vec average(Vec average, Vec value, Vec share) {
  return fma(value - average, share, base_of(share, average, value));
}

// The same with the value's square.
ALWAYS_INLINE inline Vec average_square(Vec average, Vec value, Vec share) {
  return fma(fma(value, value, -average), share, base_of(share, average, value * value));
}

// c: shares of m and v (see `average`), eps, decoupled decay, step size,
// 1 / sqrt(bias correction 2)
struct Adam {
  static constexpr int kStates = 2;
  ALWAYS_INLINE static void update(const Coefficients& c, Vec& x, Vec g, Vec& m, Vec& v) {
    m = average(m, g, c.c0);
    v = average_square(v, g, c.c1);
    const Vec denominator = fma(square_root(v), c.c5, c.c2);
    x = fma(-c.c4, m / denominator, fma(-c.c3, x, x));
  }
};

// c: as Adam
struct Amsgrad {
  static constexpr int kStates = 3;
  ALWAYS_INLINE static void update(const Coefficients& c, Vec& x, Vec g, Vec& m, Vec& v,
                                   Vec& most) {
    m = average(m, g, c.c0);
    v = average_square(v, g, c.c1);
    most = most > v ? most : v;  // NaN wins, as in torch
    const Vec denominator = fma(square_root(most), c.c5, c.c2);
    x = fma(-c.c4, m / denominator, fma(-c.c3, x, x));
  }
};

// c: shares of the direction and of m (see `average`), -, decoupled decay, learning rate
struct Lion {
  static constexpr int kStates = 1;
  ALWAYS_INLINE static void update(const Coefficients& c, Vec& x, Vec g, Vec& m, Vec&) {
    const Vec direction = average(m, g, c.c0);
    m = average(m, g, c.c1);
    x = fma(-c.c3, x, x);
    // lr with the direction's sign; 0 for a direction of 0
    const Vec signed_rate = (Vec)((Bits)c.c4 ^ ((Bits)direction & 0x80000000u));
    x = direction == 0.0f ? x : x - signed_rate;
  }
};

// c: -, -, -, decoupled decay, learning rate
struct Sgd {
  static constexpr int kStates = 0;
  ALWAYS_INLINE static void update(const Coefficients& c, Vec& x, Vec g, Vec&, Vec&) {
    x = fma(-c.c4, g, fma(-c.c3, x, x));
  }
};

// c: momentum, 1 - dampening, weight of g, decoupled decay, learning rate, weight of the momentum
struct Momentum {
  static constexpr int kStates = 1;
  ALWAYS_INLINE static void update(const Coefficients& c, Vec& x, Vec g, Vec& m, Vec&) {
    m = fma(c.c1, g, c.c0 * m);
    const Vec direction = fma(c.c5, m, c.c2 * g);
    x = fma(-c.c4, direction, fma(-c.c3, x, x));
  }
};

// c: share of m (see `average`), -, weight of g, -, -, weight of the momentum
struct Direction {
  static constexpr int kStates = 1;
  ALWAYS_INLINE static void update(const Coefficients& c, Vec& x, Vec g, Vec& m, Vec&) {
    m = average(m, g, c.c0);
    x = fma(c.c5, m, c.c2 * g);
  }
};

// c: -, -, eps, decoupled decay, learning rate
struct Adagrad {
  static constexpr int kStates = 1;
  ALWAYS_INLINE static void update(const Coefficients& c, Vec& x, Vec g, Vec& sum, Vec&) {
    sum = fma(g, g, sum);
    x = fma(-c.c4, g / (square_root(sum) + c.c2), fma(-c.c3, x, x));
  }
};

// x is the point where the gradient is taken, the state z the one that plain steps lead to.
// c: weight of z in the average, share of v (see `average`), eps, decay, learning rate,
// 1 / sqrt(bias correction 2).
// The step of x is (1 - beta1 (1 - c0)) lr; `beta1` comes in c[6], as this rule has no L2 decay.
struct ScheduleFree {
  static constexpr int kStates = 2;
  ALWAYS_INLINE static void update(const Coefficients& c, Vec& x, Vec g, Vec& z, Vec& v) {
    v = average_square(v, g, c.c1);
    const Vec direction = fma(c.c3, x, g / fma(square_root(v), c.c5, c.c2));
    const Vec share = 1.0f - c.c6 * (1.0f - c.c0);
    x = fma(-c.c4 * share, direction, fma(c.c0, z - x, x));
    z = fma(-c.c4, direction, z);
  }
};

// c: shares of m and v (see `average`), eps, decay, learning rate * trust ratio,
// 1 / sqrt(bias correction 2), L2 decay, 1 / (1 - beta1^t)
ALWAYS_INLINE inline Vec lamb_direction(const Coefficients& c, Vec x, Vec m, Vec v) {
  return fma(c.c3, x, m * c.c7 / fma(square_root(v), c.c5, c.c2));
}

struct LambNorms {
  static constexpr int kStates = 2;
  ALWAYS_INLINE static void update(const Coefficients& c, Vec&, Vec g, Vec& m, Vec& v) {
    m = average(m, g, c.c0);
    v = average_square(v, g, c.c1);
  }
};

struct LambApply {
  static constexpr int kStates = 2;
  ALWAYS_INLINE static void update(const Coefficients& c, Vec& x, Vec, Vec& m, Vec& v) {
    x = fma(-c.c4, lamb_direction(c, x, m, v), x);
  }
};

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

template <class Rule>
constexpr bool is_lamb = same<Rule, LambNorms> || same<Rule, LambApply>;

// The largest lane.
inline float maximum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#endif
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// ------------------------------------------------------------------------------------- sums

// Sums of squares in a fixed order: kWide lanes of floats over at most kStretch elements, then
// doubles. The same bits for AVX2 and AVX-512, and for any number of threads.
constexpr int kWide = 64;
constexpr int64_t kStretch = 2048;

struct Accumulator {
  Vec lanes[kWide / kLanes];
  Accumulator() : lanes() {}
  ALWAYS_INLINE void add(Vec v, int slot) { lanes[slot] = fma(v, v, lanes[slot]); }
  double total() const {
    constexpr int kVecs = kWide / kLanes;
    Vec folded[kVecs];
    for (int k = 0; k < kVecs; ++k) folded[k] = lanes[k];
    for (int half = kVecs / 2; half * kLanes >= 16; half /= 2)
      for (int k = 0; k < half; ++k) folded[k] += folded[k + half];
    float last[16];
    memcpy(last, folded, sizeof last);
    for (int half = 8; half >= 4; half /= 2)
      for (int k = 0; k < half; ++k) last[k] += last[k + half];
    return (double(last[0]) + double(last[2])) + (double(last[1]) + double(last[3]));
  }
};

template <class D>
double squared_sum_of(const typename D::T* from, int64_t count) {
  double sum = 0;
  for (int64_t start = 0; start < count; start += kStretch) {
    const int64_t end = start + kStretch < count ? start + kStretch : count;
    Accumulator accumulator;
    int64_t j = start;
    for (; j + kWide <= end; j += kWide)
#pragma GCC unroll 16  // else the accumulators live in memory
      for (int slot = 0; slot < kWide / kLanes; ++slot)
        accumulator.add(load<D>(from + j + slot * kLanes), slot);
    double part = accumulator.total();
    if (j < end) {
      Accumulator rest;
      for (int slot = 0; j < end; ++slot, j += kLanes)
        rest.add(load<D>(from + j, end - j < kLanes ? end - j : kLanes), slot);
      part += rest.total();
    }
    if (!(part < 0x1p1000)) {  // a square overflowed: finite numbers have finite sums in doubles
      part = 0;
      for (j = start; j < end; j += kLanes) {
        const Vec v = load<D>(from + j, end - j < kLanes ? end - j : kLanes);
        for (int i = 0; i < kLanes; ++i) part += double(v[i]) * double(v[i]);
      }
    }
    sum += part;
  }
  return sum;
}

double squared_sum(const void* from, int dtype, int64_t count) {
  if (dtype == kFloat32) return squared_sum_of<F32>(static_cast<const float*>(from), count);
  const uint16_t* half = static_cast<const uint16_t*>(from);
  return dtype == kBFloat16 ? squared_sum_of<BF16>(half, count) : squared_sum_of<F16>(half, count);
}

// ------------------------------------------------------------------------------------- sweep

template <bool kSigned>
inline void decode_block(const uint8_t* codes, float scale, int64_t size, float* values) {
  const Decoder<kSigned> decode(scale);
  each_vector(size, [&](int64_t at, int64_t n) ALWAYS_INLINE {
    store<F32>(values + at, decode(load_codes(codes + at, n)));
  });
}

// The first state takes the low half of an element's random bits, the second one the high half.
template <int kStates, bool kStochastic>
inline void encode_block(const float* values1, const float* values2, float scale1, float scale2,
                         int64_t size, uint32_t key, int64_t first, uint8_t* codes1,
                         uint8_t* codes2) {
  const Encoder<true> encode1(scale1);
  const Encoder<false> encode2(scale2);
  each_vector(size, [&](int64_t at, int64_t n) ALWAYS_INLINE {
    const Bits half = Bits{} + 0x80008000u;
    const Bits lift = kStochastic ? random_bits(key, first + at) : half;
    store_codes(codes1 + at, encode1(load<F32>(values1 + at), lift & 0xffffu), n);
    if (kStates == 2) store_codes(codes2 + at, encode2(load<F32>(values2 + at), lift >> 16), n);
  });
}

// What is known of the dtypes when the code is compiled.
enum class Dtypes { kAny, kFloat32, kFloat32With8BitStates, kBFloat16 };

template <class Rule, Dtypes kDtypes>
ALWAYS_INLINE inline void sweep(const StepTensor& t, const StepOptions& a, int64_t begin,
                                int64_t end, StepSums* sums) {
  constexpr bool kKnown = kDtypes != Dtypes::kAny;  // and nothing stands behind the weights
  constexpr bool kAllFloat32 = kDtypes == Dtypes::kFloat32;
  constexpr bool kAllBFloat16 = kDtypes == Dtypes::kBFloat16;
  constexpr int kWeight = kAllBFloat16 ? int(kBFloat16) : int(kFloat32);
  constexpr int kState = kAllFloat32 || kAllBFloat16 ? kWeight : kUInt8;
  const Coefficients c(t.c);
  const Vec scale = splat(a.scale);
  const int param_dtype = kKnown ? kWeight : t.param_dtype;
  const int grad_dtype = kKnown ? kWeight : t.grad_dtype;
  const int state_dtype = kKnown ? kState : t.state_dtype;
  const bool eight_bit = Rule::kStates % 3 > 0 && state_dtype == kUInt8;
  const bool stochastic = !kAllFloat32 && a.stochastic && state_dtype != kFloat32;
  float buffer1[kStateBlock], buffer2[kStateBlock];
  Accumulator weights, updates;

  for (int64_t block = begin; block < end; block += kStateBlock) {
    const int64_t size = end - block < kStateBlock ? end - block : kStateBlock;
    const int64_t index = block / kStateBlock;
    Vec largest1{}, largest2{};
    if (eight_bit) {
      decode_block<true>(static_cast<uint8_t*>(t.state1) + block, t.absmax1[index], size, buffer1);
      if (Rule::kStates == 2)
        decode_block<false>(static_cast<uint8_t*>(t.state2) + block, t.absmax2[index], size,
                            buffer2);
    }

    each_vector(size, [&](int64_t at, int64_t n) ALWAYS_INLINE {
      const int64_t j = block + at;
      Vec g = load_any(t.grad, grad_dtype, j, n) * scale;
      Vec x;
      if (!kKnown && t.master) {
        x = load<F32>(t.master + j, n);
      } else {
        x = load_any(t.param, param_dtype, j, n);
        if (!kKnown && t.compensation) x += load<BF16>(t.compensation + j, n);
      }
      Vec s1{}, s2{}, s3{};
      if (eight_bit) {
        s1 = load<F32>(buffer1 + at, n);
        if (Rule::kStates == 2) s2 = load<F32>(buffer2 + at, n);
      } else {
        if (Rule::kStates >= 1) s1 = load_any(t.state1, state_dtype, j, n);
        if (Rule::kStates >= 2) s2 = load_any(t.state2, state_dtype, j, n);
        if (Rule::kStates == 3) s3 = load_any(t.state3, state_dtype, j, n);
      }
      if (!same<Rule, ScheduleFree>) g = fma(c.c6, x, g);
      if constexpr (Rule::kStates == 3) {
        Rule::update(c, x, g, s1, s2, s3);
      } else {
        Rule::update(c, x, g, s1, s2);
      }
      if (!is_lamb<Rule> && t.c[7] != 0) x = shrink(x, c.c7);
      if (same<Rule, LambNorms>) {
        const int slot = int(at / kLanes) % (kWide / kLanes);
        weights.add(x, slot);
        // Lanes beyond the end hold zeros; without eps their direction would be 0 / 0.
        const Vec direction = lamb_direction(c, x, s1, s2);
        updates.add(s2 > 0.0f ? direction : c.c3 * x, slot);
      } else {
        if (!kKnown && t.master) store<F32>(t.master + j, x, n);
        store_any(t.param, param_dtype, j, x, n);
        if (!kKnown && t.compensation)
          store<BF16>(t.compensation + j, x - load_any(t.param, param_dtype, j, n), n);
      }
      if (same<Rule, LambApply>) return;
      if (eight_bit) {
        store<F32>(buffer1 + at, s1, n);
        const Vec size1 = magnitude(s1);
        largest1 = largest1 > size1 ? largest1 : size1;
        if (Rule::kStates == 2) {
          store<F32>(buffer2 + at, s2, n);
          largest2 = largest2 > s2 ? largest2 : s2;
        }
      } else {
        if (stochastic && state_dtype == kBFloat16) {
          const Bits random = random_bits(t.key, j);
          s1 = round_randomly(s1, random & 0xffffu);
          s2 = round_randomly(s2, random >> 16);
        }
        if (Rule::kStates >= 1) store_any(t.state1, state_dtype, j, s1, n);
        if (Rule::kStates >= 2) store_any(t.state2, state_dtype, j, s2, n);
        // The largest so far adds nothing up, so nothing is lost by rounding it to nearest.
        if (Rule::kStates == 3) store_any(t.state3, state_dtype, j, s3, n);
      }
    });
    if (a.zero_grad && !same<Rule, LambNorms>) {
      const int64_t width = grad_dtype == kFloat32 ? 4 : 2;
      memset(static_cast<char*>(t.grad) + block * width, 0, size_t(size * width));
    }
    if (eight_bit) {
      const float most1 = maximum(largest1), most2 = maximum(largest2);
      t.absmax1[index] = most1;
      if (Rule::kStates == 2) t.absmax2[index] = most2;
      const auto encode =
          stochastic ? encode_block<Rule::kStates, true> : encode_block<Rule::kStates, false>;
      encode(buffer1, buffer2, most1, most2, size, t.key, block,
             static_cast<uint8_t*>(t.state1) + block, static_cast<uint8_t*>(t.state2) + block);
    }
  }
  if (same<Rule, LambNorms>) {
    sums->weight += weights.total();
    sums->update += updates.total();
  }
}

template <class Rule>
void step(const StepTensor& t, const StepOptions& a, int64_t begin, int64_t end, StepSums* sums) {
  const auto all = [&](int weights, int states) {
    return t.param_dtype == weights && t.grad_dtype == weights && !t.master && !t.compensation &&
           (Rule::kStates == 0 || t.state_dtype == states);
  };
  if (all(kFloat32, kFloat32))
    sweep<Rule, Dtypes::kFloat32>(t, a, begin, end, sums);
  else if (Rule::kStates < 3 && all(kFloat32, kUInt8))
    sweep<Rule, Dtypes::kFloat32With8BitStates>(t, a, begin, end, sums);
  else if (all(kBFloat16, kBFloat16))
    sweep<Rule, Dtypes::kBFloat16>(t, a, begin, end, sums);
  else
    sweep<Rule, Dtypes::kAny>(t, a, begin, end, sums);
}

constexpr StepKernels kStepKernels = {
    {step<Adam>, step<Lion>, step<Sgd>, step<Momentum>, step<Adagrad>, step<ScheduleFree>,
     step<LambNorms>, step<LambApply>, step<Direction>, step<Amsgrad>},
    squared_sum};

}  // namespace

const StepKernels AT_LEVEL(step) = kStepKernels;
