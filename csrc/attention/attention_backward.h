// The backward of a share of the queries; a part of attention_kernels.h.
//
// With p = exp(s - lse) and delta = dout . out - dlse, for each block of keys and of queries:
//   S^T = K Q^T, dP^T = V dO^T, dS^T = P^T (dP^T - delta)
//   dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T
// all accumulated in float32. A share owns its sums, so nothing is atomic and the order is fixed.
#pragma once

namespace {

template <class Engine, class X>
struct Backward {
  using T = typename X::T;
  static constexpr int64_t kQueries = kBackwardQueries;
  static constexpr int64_t kQueryWords = kQueries / Engine::kPair;  // as a product's depth
  static constexpr int64_t kKeyWords = kKeyBlock / Engine::kPair;

  struct Scratch {
    uint32_t *q, *dout, *out;         // turned: [words][kQueries]
    uint32_t *q_paired, *dout_paired;  // [kQueryWords][columns]
    uint32_t *p, *ds;                  // P^T, dS^T by rows: [kKeyBlock][kQueryWords]
    uint32_t* ds_paired;               // dS^T, pairs of keys: [kKeyWords][kQueries]
    float *scores, *dp, *slope;        // [kKeyBlock][kQueries]
    float* dq;                         // dQ^T [rows][kQueries]

    Scratch(void* memory, const Shape<Engine>& shape) {
      uint32_t* at = static_cast<uint32_t*>(memory);
      const auto take = [&](int64_t words) {
        uint32_t* const taken = at;
        at += words;
        return taken;
      };
      q = take(shape.words * kQueries);
      dout = take(shape.words * kQueries);
      out = take(shape.words * kQueries);
      q_paired = take(kQueryWords * shape.columns);
      dout_paired = take(kQueryWords * shape.columns);
      p = take(kKeyBlock * kQueryWords);
      ds = take(kKeyBlock * kQueryWords);
      // With one element in a word, a row of dS^T is its own pair.
      ds_paired = Engine::kPair == 1 ? ds : take(kKeyWords * kQueries);
      scores = reinterpret_cast<float*>(take(kKeyBlock * kQueries));
      dp = reinterpret_cast<float*>(take(kKeyBlock * kQueries));
      slope = reinterpret_cast<float*>(take(kKeyBlock * kQueries));
      dq = reinterpret_cast<float*>(take(shape.rows * kQueries));
      bytes = 4 * (at - static_cast<uint32_t*>(memory));
    }
    int64_t bytes;
  };

  static int64_t scratch_bytes(const Shape<Engine>& shape) {
    alignas(64) static char nothing[64];
    return Scratch(nothing, shape).bytes;
  }

  // By query: lse to the base 2 as a whole number and a fraction, and delta.
  struct State {
    alignas(64) float whole[kQueries], fraction[kQueries], delta[kQueries];
    alignas(64) float sum[kQueries], lost[kQueries];  // of p * dp, and what rounding took from it
  };

  static void run(const Attention& a, const AttentionSequence& s, const AttentionShare& share,
                  void* memory) {
    const Shape<Engine> shape(a.size);
    const Scratch scratch(memory, shape);
    const int64_t group = a.heads / a.key_heads;
    const int64_t blocks = (s.rows + kQueries - 1) / kQueries;
    const size_t sums = size_t(4 * round_up(s.cols, kKeyBlock) * shape.columns);
    memset(share.dk, 0, sums);
    memset(share.dv, 0, sums);
    Engine::begin();
    for (int64_t block = share.first; block < blocks; block += share.step)
      for (int64_t head = share.key_head * group; head < (share.key_head + 1) * group; ++head)
        run_block(a, s, share, head, block, shape, scratch);
    Engine::end();
  }

  static void run_block(const Attention& a, const AttentionSequence& s,
                        const AttentionShare& share, int64_t head, int64_t block,
                        const Shape<Engine>& shape, const Scratch& scratch) {
    const Range range(a, s, block, kQueries);
    const int64_t step = Engine::kDepthStep > 16 ? Engine::kDepthStep : 16;
    const int64_t columns = round_up(range.queries, step);
    const int64_t at = share.key_head * a.packed_rows + s.packed;
    const uint32_t* const keys = static_cast<const uint32_t*>(a.packed_keys) + at * shape.words;
    const uint32_t* const values =
        static_cast<const uint32_t*>(a.packed_values) + at * shape.words;
    const uint32_t* const turned = static_cast<const uint32_t*>(a.packed_keys_turned) +
                                   at / kKeyBlock * shape.turned_block();
    State state;
    load(a, s, head, range, columns, shape, scratch, state);

    memset(scratch.dq, 0, size_t(4 * shape.rows * kQueries));
    // The sum of p * dp over the keys is delta, too, and a better one than dout . out, since out was
    // rounded. It matters to queries that see few keys, whose dp - delta is small.
    const int64_t first_begin = range.begin / kKeyBlock * kKeyBlock;
    const bool few = range.end - first_begin <= 2 * kKeyBlock;
    memset(state.sum, 0, sizeof state.sum);
    memset(state.lost, 0, sizeof state.lost);
    for (int pass = few ? 0 : 1; pass < 2; ++pass) {
      for (int64_t block_begin = first_begin; block_begin < range.end; block_begin += kKeyBlock) {
        int64_t begin = range.begin > block_begin ? range.begin : block_begin;
        begin = begin / Engine::kDepthStep * Engine::kDepthStep;
        const int64_t end =
            range.end < block_begin + kKeyBlock ? range.end : block_begin + kKeyBlock;
        const auto part = range.columns(begin, end, columns, step);
        const int64_t rows = round_up(end - begin, Engine::kRowStep);
        const int64_t depth = round_up(end - begin, Engine::kDepthStep) / Engine::kPair;
        product<Engine, kSet>(rows, part.count(), shape.words, keys + begin * shape.words,
                              shape.words, scratch.q + part.begin, kQueries,
                              scratch.scores + part.begin, kQueries);
        product<Engine, kSet>(rows, part.count(), shape.words, values + begin * shape.words,
                              shape.words, scratch.dout + part.begin, kQueries,
                              scratch.dp + part.begin, kQueries);
        weigh(a, s, head, range, begin, end, part, pass == 0, scratch, state);
        if (pass == 0) continue;
        const int64_t skip = part.begin / Engine::kPair;
        const int64_t query_words = part.count() / Engine::kPair;
        product<Engine, kAdd>(rows, shape.columns, query_words, scratch.p + skip, kQueryWords,
                              scratch.dout_paired + skip * shape.columns, shape.columns,
                              share.dv + begin * shape.columns, shape.columns);
        product<Engine, kAdd>(rows, shape.columns, query_words, scratch.ds + skip, kQueryWords,
                              scratch.q_paired + skip * shape.columns, shape.columns,
                              share.dk + begin * shape.columns, shape.columns);
        const uint32_t* const k = turned + block_begin / kKeyBlock * shape.turned_block() +
                                  (begin - block_begin) / Engine::kPair;
        product<Engine, kAdd>(shape.rows, part.count(), depth, k, shape.kTurnedWords,
                              scratch.ds_paired + part.begin, kQueries, scratch.dq + part.begin,
                              kQueries);
      }
      if (pass == 0) take_delta(a, s, head, range, state);
    }
    alignas(64) float scale[kQueries];
    for (int64_t i = 0; i < kQueries; ++i) scale[i] = a.scale;
    store_turned<X>(scratch.dq, kQueries, scale, range.queries, shape.size,
                    output<X>(a.dq, s.output_row + range.query, a.heads, head, shape.size),
                    a.heads * shape.size);
  }

  // Packs the block's queries and upstream gradients, and prepares its state.
  static void load(const Attention& a, const AttentionSequence& s, int64_t head,
                   const Range& range, int64_t columns, const Shape<Engine>& shape,
                   const Scratch& scratch, State& state) {
    const int64_t row = s.first_row + range.query;
    const T* const q = element<T>(a.q, s.index, row, head);
    const T* const dout = element<T>(a.dout, s.index, row, head);
    const T* const out = element<T>(a.o, s.index, row, head);
    const int64_t words = columns / Engine::kPair;
    pack_turned<Engine, X>(q, a.q.row, range.queries, a.size, columns, shape.words, scratch.q,
                           kQueries);
    pack_turned<Engine, X>(dout, a.dout.row, range.queries, a.size, columns, shape.words,
                           scratch.dout, kQueries);
    pack_turned<Engine, X>(out, a.o.row, range.queries, a.size, columns, shape.words, scratch.out,
                           kQueries);
    pack_paired<Engine, X>(q, a.q.row, range.queries, a.size, words, shape.columns,
                           scratch.q_paired);
    pack_paired<Engine, X>(dout, a.dout.row, range.queries, a.size, words, shape.columns,
                           scratch.dout_paired);
    // In the order of the products: for a query that sees one key, dp - delta is then exactly 0.
    for (int64_t i = 0; i < columns; i += kLanes) {
      Vec delta{};
      for (int64_t k = 0; k < shape.words; ++k) {
        Vec x, y;
        memcpy(&x, scratch.out + k * kQueries + i, sizeof x);
        memcpy(&y, scratch.dout + k * kQueries + i, sizeof y);
        delta = Engine::multiply_add(x, y, delta);
      }
      memcpy(state.delta + i, &delta, sizeof delta);
    }
    for (int64_t i = 0; i < columns; ++i) {
      // Of a query that sees nothing, or is none: 2^(x - infinity) is 0, without a NaN.
      state.whole[i] = -kLowest;
      state.fraction[i] = 0;
      if (i >= range.queries) continue;
      const int64_t at = statistics(a, s, head, range.query + i);
      if (a.dlse) state.delta[i] -= a.dlse[at];
      a.delta[at] = state.delta[i];
      if (a.lse[at] == -__builtin_inff()) continue;
      const double lse = (double(a.lse[at]) + (a.rest ? double(a.rest[at]) : 0)) * kLog2eDouble;
      const double whole = __builtin_rint(lse);
      state.whole[i] = float(whole);
      state.fraction[i] = float(lse - whole);
    }
  }

  // Takes the sum of p * dp for delta.
  static void take_delta(const Attention& a, const AttentionSequence& s, int64_t head,
                         const Range& range, State& state) {
    for (int64_t i = 0; i < range.queries; ++i) {
      const int64_t at = statistics(a, s, head, range.query + i);
      a.delta[at] = state.delta[i] = state.sum[i] - (a.dlse ? a.dlse[at] : 0.0f);
    }
  }

  // Turns the scores of keys [begin, end) and dP^T into P^T and dS^T; or, with `sum`, only adds
  // p * dp to the state.
  static void weigh(const Attention& a, const AttentionSequence& s, int64_t head,
                    const Range& range, int64_t begin, int64_t end, const Range::Columns& part,
                    bool sum, const Scratch& scratch, State& state) {
    const bool slope = a.softcap > 0;
    if (shaped(a)) shape_scores(a, scratch.scores, scratch.slope, (end - begin) * kQueries);
    const ToExponent<Engine> to_exponent(a);
    const Dropout dropout(a, s, head);
    const auto rows = sum ? weigh_rows<false, true>
                      : range.all(begin, end) && !dropout.on && !slope
                          ? weigh_rows<true, false>
                          : weigh_rows<false, false>;
    rows(range, begin, end, part, to_exponent, slope, dropout, scratch, state);
    if (sum) return;
    // Rows and depth that only fill a tile count as zero.
    for (int64_t j = end - begin; j < round_up(end - begin, Engine::kRowStep); ++j) {
      memset(scratch.p + j * kQueryWords, 0, size_t(4 * kQueryWords));
      memset(scratch.ds + j * kQueryWords, 0, size_t(4 * kQueryWords));
    }
    if (Engine::kPair == 1) return;
    const int64_t from = (end - begin + 1) / 2;
    const int64_t to = round_up(end - begin, Engine::kDepthStep) / Engine::kPair;
    memset(scratch.ds_paired + from * kQueries, 0, size_t(4 * (to - from) * kQueries));
  }

  template <bool kPlain, bool kSum>
  static void weigh_rows(const Range& range, int64_t begin, int64_t end,
                         const Range::Columns& part, ToExponent<Engine> to_exponent, bool slope,
                         const Dropout& dropout, const Scratch& scratch, State& state) {
    struct Pair {
      Vec p, ds;
    };
    const auto weight = [&](int64_t j, int64_t i) ALWAYS_INLINE {
      const int64_t at = (j - begin) * kQueries + i;
      Vec score, dp, whole, fraction, delta;
      memcpy(&score, scratch.scores + at, sizeof score);
      memcpy(&dp, scratch.dp + at, sizeof dp);
      memcpy(&whole, state.whole + i, sizeof whole);
      memcpy(&fraction, state.fraction + i, sizeof fraction);
      memcpy(&delta, state.delta + i, sizeof delta);
      // 2^(score * to_exponent - whole - fraction), with no sum of large numbers to round.
      const Vec n = round(fma(score, splat(to_exponent.high), -fraction));
      const Vec f = to_exponent(score, n) - fraction;
      Vec p = scale_by_power(power_of_two<Engine::kDegree>(f), n - whole);
      if (!kPlain) p = seen(range.lanes(j), int32_t(i)) ? p : Vec{};
      Vec dropped = p;
      if (!kPlain && dropout.on) {
        const Vec keep = dropout(j, range.query + i);
        dropped = p * keep;
        dp *= keep;
      }
      if (kSum) {
        Vec sum, lost;
        memcpy(&sum, state.sum + i, sizeof sum);
        memcpy(&lost, state.lost + i, sizeof lost);
        const Vec term = fma(p, dp, lost), total = sum + term;
        lost = term - (total - sum);
        memcpy(state.sum + i, &total, sizeof total);
        memcpy(state.lost + i, &lost, sizeof lost);
        return Pair{};
      }
      Vec ds = p * (dp - delta);
      if (!kPlain && slope) {
        Vec factor;
        memcpy(&factor, scratch.slope + at, sizeof factor);
        ds *= factor;
      }
      return Pair{dropped, ds};
    };
    if (kSum) {
      for (int64_t j = begin; j < end; ++j)
        for (int64_t i = part.begin; i < part.end; i += kLanes) weight(j, i);
      return;
    }
    for (int64_t j = begin; j < end; j += Engine::kPair) {
      const int64_t row = j - begin;
      for (int64_t i = part.begin; i < part.end; i += kLanes) {
        const Pair one = weight(j, i);
        if constexpr (Engine::kPair == 2) {
          const Pair other = j + 1 < end ? weight(j + 1, i) : Pair{};
          store_two_rows(scratch.p + row * kQueryWords + i / 2, one.p, other.p);
          store_two_rows(scratch.ds + row * kQueryWords + i / 2, one.ds, other.ds);
          store_pair<Engine>(scratch.ds_paired + row / 2 * kQueries + i, one.ds, other.ds);
        } else {
          memcpy(scratch.p + row * kQueryWords + i, &one.p, sizeof(Vec));
          memcpy(scratch.ds + row * kQueryWords + i, &one.ds, sizeof(Vec));
        }
      }
    }
  }

  // 16 elements of a row and of the next one, kQueryWords words on.
  ALWAYS_INLINE static void store_two_rows(uint32_t* to, Vec first, Vec second) {
#if defined(__AVX512BF16__)
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i*)(to + kQueryWords), _mm512_extracti64x4_epi64(both, 1));
#else
    (void)to, (void)first, (void)second;
#endif
  }

  static void finish(const Attention& a, const AttentionSequence& s, const AttentionShare* shares,
                     int64_t count, int64_t block) {
    const Shape<Engine> shape(a.size);
    const int64_t begin = block * kKeyBlock;
    const int64_t end = s.cols < begin + kKeyBlock ? s.cols : begin + kKeyBlock;
    for (int64_t j = begin; j < end; ++j) {
      const int64_t row = s.output_col + j, head = shares[0].key_head;
      T* const dk = output<X>(a.dk, row, a.key_heads, head, shape.size);
      T* const dv = output<X>(a.dv, row, a.key_heads, head, shape.size);
      for (int64_t i = 0; i < shape.size; i += kLanes) {
        const int64_t there = shape.size - i < kLanes ? shape.size - i : kLanes;
        Vec k{}, v{};
        for (int64_t n = 0; n < count; ++n) {
          Vec more;
          memcpy(&more, shares[n].dk + j * shape.columns + i, sizeof more);
          k += more;
          memcpy(&more, shares[n].dv + j * shape.columns + i, sizeof more);
          v += more;
        }
        k *= a.scale;
        if (there == kLanes) {
          store<X>(dk + i, k);
          store<X>(dv + i, v);
        } else {
          store<X>(dk + i, k, there);
          store<X>(dv + i, v, there);
        }
      }
    }
  }
};

}  // namespace
