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
    float *scores[2], *dp[2];          // S^T, dP^T of two blocks, [kKeyBlock][kQueries]
    float* slope;                      // [kKeyBlock][kQueries]
    float* dq;                         // dQ^T [rows][kQueries]

    int64_t bytes;

    Scratch(void* memory, const Shape<Engine>& shape) {
      Cut cut{memory};
      q = cut.take(shape.words * kQueries);
      dout = cut.take(shape.words * kQueries);
      out = cut.take(shape.words * kQueries);
      q_paired = cut.take(kQueryWords * shape.columns);
      dout_paired = cut.take(kQueryWords * shape.columns);
      p = cut.take(kKeyBlock * kQueryWords);
      ds = cut.take(kKeyBlock * kQueryWords);
      // With one element in a word, a row of dS^T is its own pair.
      ds_paired = Engine::kPair == 1 ? ds : cut.take(kKeyWords * kQueries);
      for (int i = 0; i < 2; ++i) {
        const bool another = i == 0 || Engine::kTiles;
        scores[i] = another ? cut.take_floats(kKeyBlock * kQueries) : scores[0];
        dp[i] = another ? cut.take_floats(kKeyBlock * kQueries) : dp[0];
      }
      slope = cut.take_floats(kKeyBlock * kQueries);
      dq = cut.take_floats(shape.rows * kQueries);
      bytes = 4 * cut.words;
    }
  };

  // By query: lse to the base 2, in the two parts that Exponential takes, and delta.
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
    const int64_t at = first_packed(a, s, share.key_head);
    const uint32_t* const keys = shape.packed_row(a.packed_keys, at);
    const uint32_t* const values = shape.packed_row(a.packed_values, at);
    State state;
    load(a, s, head, range, columns, shape, scratch, state);
    const Call call{range, Exponential<Engine>(a), Dropout(a, s, head), a.softcap > 0, scratch,
                    state, Engine::kTiles ? round_up(8192 / a.size, 16) : kQueries};
    const auto score = [&](const Block& b, auto&& meanwhile) ALWAYS_INLINE {
      const int64_t rows = round_up(b.keys(), Engine::kRowStep), from = b.part.begin;
      product<Engine, kSet>(rows, b.part.count(), shape.words, keys + b.begin * shape.words,
                            shape.words, scratch.q + from, kQueries, b.scores + from, kQueries,
                            nullptr, meanwhile);
      product<Engine, kSet>(rows, b.part.count(), shape.words, values + b.begin * shape.words,
                            shape.words, scratch.dout + from, kQueries, b.dp + from, kQueries,
                            nullptr, meanwhile);
    };
    const auto shape_block = [&](const Block& b) {
      if (shaped(a)) shape_scores(a, b.scores, scratch.slope, b.keys() * kQueries);
    };
    const auto block_at = [&](int64_t base, int buffer) {
      const auto block = range.block(base, columns, Engine::kDepthStep, step);
      const bool plain = range.all(block.begin, block.end) && !call.dropout.on && !call.slope;
      return Block{block, scratch.scores[buffer], scratch.dp[buffer], plain};
    };
    memset(scratch.dq, 0, size_t(4 * shape.rows * kQueries));
    const NothingMeanwhile nothing;

    // The sum of p * dp over the keys is delta, too, and a better one than dout . out, since out
    // was rounded. It matters to queries that see few keys, whose dp - delta is small.
    if (range.end - range.first_base() <= 2 * kKeyBlock) {
      memset(state.sum, 0, sizeof state.sum);
      memset(state.lost, 0, sizeof state.lost);
      for (int64_t base = range.first_base(); base < range.end; base += kKeyBlock) {
        const Block b = block_at(base, 0);
        score(b, nothing);
        shape_block(b);
        sum_delta(call, b);
      }
      take_delta(a, s, head, range, state);
    }

    if (range.begin < range.end) {
      Block now = block_at(range.first_base(), 0);
      score(now, nothing);
      for (int turn = 1;; turn ^= 1) {
        const bool more = now.base + kKeyBlock < range.end;
        const Block next = more ? block_at(now.base + kKeyBlock, turn) : now;
        shape_block(now);
        Weigh weigh{call, now};
        if (Engine::kTiles && more) score(next, weigh);
        while (weigh()) {
        }
        pad(now, scratch);
        const int64_t rows = round_up(now.keys(), Engine::kRowStep);
        const int64_t depth = round_up(now.keys(), Engine::kDepthStep) / Engine::kPair;
        const int64_t skip = now.part.begin / Engine::kPair;
        const int64_t query_words = now.part.count() / Engine::kPair;
        product<Engine, kAdd>(rows, shape.columns, query_words, scratch.p + skip, kQueryWords,
                              scratch.dout_paired + skip * shape.columns, shape.columns,
                              share.dv + now.begin * shape.columns, shape.columns);
        product<Engine, kAdd>(rows, shape.columns, query_words, scratch.ds + skip, kQueryWords,
                              scratch.q_paired + skip * shape.columns, shape.columns,
                              share.dk + now.begin * shape.columns, shape.columns);
        const uint32_t* const k = shape.packed_block(a.packed_keys_turned, at + now.base) +
                                  (now.begin - now.base) / Engine::kPair;
        product<Engine, kAdd>(shape.rows, now.part.count(), depth, k, shape.kTurnedWords,
                              scratch.ds_paired + now.part.begin, kQueries,
                              scratch.dq + now.part.begin, kQueries);
        if (!more) break;
        if (!Engine::kTiles) score(next, nothing);
        now = next;
      }
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
    // Four sums, for the latency and for the rounding error of a long one.
    for (int64_t i = 0; i < columns; i += kLanes) {
      Vec sums[4] = {};
      for (int64_t k = 0; k < shape.words; ++k) {
        Vec x, y;
        memcpy(&x, scratch.out + k * kQueries + i, sizeof x);
        memcpy(&y, scratch.dout + k * kQueries + i, sizeof y);
        sums[k % 4] = Engine::multiply_add(x, y, sums[k % 4]);
      }
      const Vec delta = (sums[0] + sums[1]) + (sums[2] + sums[3]);
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
      const double remainder = a.lse_remainder ? double(a.lse_remainder[at]) : 0;
      const double lse = (double(a.lse[at]) + remainder) * kLog2eDouble;
      const double whole = Engine::kExact ? __builtin_rint(lse) : lse;
      state.whole[i] = float(whole);
      state.fraction[i] = Engine::kExact ? float(lse - whole) : 0.0f;
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

  // What the vector work of all blocks needs.
  struct Call {
    const Range& range;
    Exponential<Engine> exponential;
    Dropout dropout;
    bool slope;
    const Scratch& scratch;
    State& state;
    int64_t unit;  // columns to be weighed at a time
  };

  // A block of keys, its scores S^T and dP^T [keys][kQueries].
  struct Block : Range::Block {
    float *scores, *dp;
    bool plain;  // every query sees every key, and neither dropout nor softcap is in the way
  };

  struct Gradients {
    Vec p, ds;  // with kSum, p * dp instead of ds
  };

  template <bool kPlain, bool kSum>
  ALWAYS_INLINE static Gradients weight(const Call& call, const Block& b, int64_t j, int64_t i) {
    const int64_t at = (j - b.begin) * kQueries + i;
    const State& state = call.state;
    Vec score, dp, whole, fraction, delta;
    memcpy(&score, b.scores + at, sizeof score);
    memcpy(&dp, b.dp + at, sizeof dp);
    memcpy(&whole, state.whole + i, sizeof whole);
    memcpy(&fraction, state.fraction + i, sizeof fraction);
    memcpy(&delta, state.delta + i, sizeof delta);
    Vec p = call.exponential(score, whole, fraction);
    if (!kPlain) p = seen(call.range.lanes(j), int32_t(i)) ? p : Vec{};
    Vec dropped = p;
    if (!kPlain && call.dropout.on) {
      const Vec keep = call.dropout(j, call.range.query + i);
      dropped = p * keep;
      dp *= keep;
    }
    if (kSum) return {p, p * dp};
    Vec ds = p * (dp - delta);
    if (!kPlain && call.slope) {
      Vec factor;
      memcpy(&factor, call.scratch.slope + at, sizeof factor);
      ds *= factor;
    }
    return {dropped, ds};
  }

  static void sum_delta(const Call& call, const Block& b) {
    State& state = call.state;
    for (int64_t j = b.begin; j < b.end; ++j)
      for (int64_t i = b.part.begin; i < b.part.end; i += kLanes) {
        Vec sum, lost;
        memcpy(&sum, state.sum + i, sizeof sum);
        memcpy(&lost, state.lost + i, sizeof lost);
        const Vec term = weight<false, true>(call, b, j, i).ds + lost, total = sum + term;
        lost = term - (total - sum);
        memcpy(state.sum + i, &total, sizeof total);
        memcpy(state.lost + i, &lost, sizeof lost);
      }
  }

  // Turns a block's scores and dP^T into P^T and dS^T, a row of words and some columns at a time.
  struct Weigh {
    const Call& call;
    const Block& block;
    int64_t key = block.begin, column = block.part.begin;

    bool operator()() {
      if (key >= block.end) return false;
      const int64_t last = column + call.unit < block.part.end ? column + call.unit
                                                               : block.part.end;
      if (block.plain)
        weigh<true>(last);
      else
        weigh<false>(last);
      column = last;
      if (column == block.part.end) {
        column = block.part.begin;
        key += Engine::kPair;
      }
      return true;
    }

    template <bool kPlain>
    void weigh(int64_t last) {
      const Scratch& to = call.scratch;
      const int64_t row = key - block.begin;
      for (int64_t i = column; i < last; i += kLanes) {
        const Gradients one = weight<kPlain, false>(call, block, key, i);
        if constexpr (Engine::kPair == 2) {
          Gradients other{};
          if (key + 1 < block.end) other = weight<kPlain, false>(call, block, key + 1, i);
          store_two_rows(to.p + row * kQueryWords + i / 2, one.p, other.p);
          store_two_rows(to.ds + row * kQueryWords + i / 2, one.ds, other.ds);
          store_pair<Engine>(to.ds_paired + row / 2 * kQueries + i, one.ds, other.ds);
        } else {
          memcpy(to.p + row * kQueryWords + i, &one.p, sizeof(Vec));
          memcpy(to.ds + row * kQueryWords + i, &one.ds, sizeof(Vec));
        }
      }
    }
  };

  // Rows and depth that only fill a step of a product count as zero.
  static void pad(const Block& b, const Scratch& scratch) {
    for (int64_t j = b.keys(); j < round_up(b.keys(), Engine::kRowStep); ++j) {
      memset(scratch.p + j * kQueryWords, 0, size_t(4 * kQueryWords));
      memset(scratch.ds + j * kQueryWords, 0, size_t(4 * kQueryWords));
    }
    pad_depth<Engine>(b.keys(), kQueries, scratch.ds_paired);
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
