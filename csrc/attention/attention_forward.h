// The forward of one block of queries; a part of attention_kernels.h.
//
// For each block of keys: S^T = K Q^T; the running maximum and sum of each query; P^T = 2^(S^T -
// max); O^T += V^T P^T. Exponents are taken to the base 2, and the running maximum is rounded up to
// a whole number: rescaling is then exact, seldom needed, and 2^(x - max) loses nothing to the
// subtraction.
#pragma once

namespace {

template <class Engine, class X>
struct Forward {
  static constexpr int64_t kQueries = kForwardQueries;

  struct Scratch {
    uint32_t *queries, *p;  // Q^T [words][kQueries]; P^T [keys in words][kQueries]
    float *scores[2], *out;  // S^T of two blocks, [kKeyBlock][kQueries]; O^T [shape.rows][kQueries]
    int64_t bytes;

    Scratch(void* memory, const Shape<Engine>& shape) {
      Cut cut{memory};
      queries = cut.take(shape.words * kQueries);
      p = cut.take(kKeyBlock / Engine::kPair * kQueries);
      scores[0] = cut.take_floats(kKeyBlock * kQueries);
      scores[1] = Engine::kTiles ? cut.take_floats(kKeyBlock * kQueries) : scores[0];
      out = cut.take_floats(shape.rows * kQueries);
      bytes = 4 * cut.words;
    }
  };

  // A query's running maximum, its sum and what the sum lost to rounding, and what its output so
  // far is to be multiplied with.
  struct State {
    alignas(64) float highest[kQueries], sum[kQueries], lost[kQueries], rescale[kQueries];
  };

  static void run(const Attention& a, const AttentionSequence& s, int64_t head, int64_t block,
                  void* memory) {
    using T = typename X::T;
    const Shape<Engine> shape(a.size);
    const Scratch scratch(memory, shape);
    const Range range(a, s, block, kQueries);
    const int64_t key_head = head / (a.heads / a.key_heads);
    const T* q = element<T>(a.q, s.index, s.first_row + range.query, head);
    const int64_t columns = round_up(range.queries, 16);
    const int64_t at = first_packed(a, s, key_head);
    const uint32_t* const keys = shape.packed_row(a.packed_keys, at);

    Engine::begin();
    pack_turned<Engine, X>(q, a.q.row, range.queries, a.size, columns, shape.words,
                           scratch.queries, kQueries);
    State state;
    for (int64_t i = 0; i < kQueries; ++i) {
      state.highest[i] = kLowest;
      state.sum[i] = state.lost[i] = 0;
    }
    memset(scratch.out, 0, size_t(4 * shape.rows * kQueries));
    // Between the tiles, as many keys as are done when the next scores are.
    const int64_t unit = !Engine::kTiles ? kKeyBlock : a.size <= 64 ? 8 : a.size <= 128 ? 4 : 2;
    const Call call{range, Exponential<Engine>(a), Dropout(a, s, head), scratch.p, state, unit};
    const auto score = [&](const Block& b, auto&& meanwhile) ALWAYS_INLINE {
      product<Engine, kSet>(round_up(b.keys(), Engine::kRowStep), b.part.count(), shape.words,
                            keys + b.begin * shape.words, shape.words,
                            scratch.queries + b.part.begin, kQueries, b.scores + b.part.begin,
                            kQueries, nullptr, meanwhile);
      if (shaped(a)) shape_scores(a, b.scores, nullptr, b.keys() * kQueries);
    };
    const auto add_values = [&](const Block& b, auto&& meanwhile) ALWAYS_INLINE {
      const int64_t depth = round_up(b.keys(), Engine::kDepthStep) / Engine::kPair;
      const uint32_t* const v =
          shape.packed_block(a.packed_values, at + b.base) + (b.begin - b.base) / Engine::kPair;
      const uint32_t* const p = scratch.p + b.part.begin;
      float* const out = scratch.out + b.part.begin;
      if (b.rescale)
        product<Engine, kScaleAdd>(shape.rows, b.part.count(), depth, v, shape.kTurnedWords, p,
                                   kQueries, out, kQueries, state.rescale + b.part.begin,
                                   meanwhile);
      else
        product<Engine, kAdd>(shape.rows, b.part.count(), depth, v, shape.kTurnedWords, p,
                              kQueries, out, kQueries, nullptr, meanwhile);
    };
    // With tiles, a block's scores are computed while the one before is weighed, and its highest
    // are sought while that one's values are added. Without, the work on a block is done in one go.
    if (range.begin < range.end) {
      const NothingMeanwhile nothing;
      Block now = next_block(range, range.first_base(), columns, scratch.scores[0], call);
      score(now, nothing);
      for (Highest highest{call, now}; highest();) {
      }
      for (int turn = 1;; turn ^= 1) {
        const bool more = now.base + kKeyBlock < range.end;
        Block next = now;
        if (more)
          next = next_block(range, now.base + kKeyBlock, columns, scratch.scores[turn], call);
        Weigh weigh{call, now};
        if (Engine::kTiles && more) score(next, weigh);
        while (weigh()) {
        }
        pad_depth<Engine>(now.keys(), kQueries, scratch.p);
        Highest highest{call, next};
        if (Engine::kTiles && more)
          add_values(now, highest);
        else
          add_values(now, nothing);
        if (!more) break;
        if (!Engine::kTiles) score(next, nothing);
        while (highest()) {
        }
        now = next;
      }
    }
    Engine::end();
    finish(a, s, head, range, state, shape, scratch);
  }

  // What the vector work of all blocks needs.
  struct Call {
    const Range& range;
    Exponential<Engine> exponential;
    Dropout dropout;
    uint32_t* p;
    State& state;
    int64_t unit;  // keys to be weighed at a time
  };

  // A block of keys and its scores S^T [keys][kQueries].
  struct Block : Range::Block {
    float* scores;
    bool plain;    // every query of the block sees every key, and nothing is dropped
    bool rescale;  // the output so far must be multiplied with the state's `rescale`
  };

  static Block next_block(const Range& range, int64_t base, int64_t columns, float* scores,
                          const Call& call) {
    const auto block = range.block(base, columns, Engine::kDepthStep, 16);
    return {block, scores, range.all(block.begin, block.end) && !call.dropout.on, false};
  }

  // Calls f<vectors, plain>(first column) on the block's columns from `column` on: four registers
  // at a time, which hide the latency of a maximum or a sum behind each other, and then sixteen
  // columns.
  template <class F>
  ALWAYS_INLINE static void on_columns(const Block& b, int64_t& column, F&& f) {
    if (column + 4 * kLanes <= b.part.end) {
      if (b.plain)
        f(Constant<4>(), Constant<1>());
      else
        f(Constant<4>(), Constant<0>());
      column += 4 * kLanes;
    } else {
      f(Constant<16 / kLanes>(), Constant<0>());
      column += 16;
    }
  }

  // Raises the running maxima to the block's scores, some columns at a time.
  struct Highest {
    const Call& call;
    Block& block;
    int64_t column = block.part.begin;

    bool operator()() {
      if (column >= block.part.end) return false;
      const int64_t first = column;
      on_columns(block, column, [&](auto vecs, auto plain) ALWAYS_INLINE {
        raise<decltype(vecs)::value, decltype(plain)::value>(first);
      });
      return true;
    }

    template <int kVecs, int kPlain>
    void raise(int64_t first) {
      Vec highest[kVecs];
      for (int i = 0; i < kVecs; ++i) highest[i] = splat(kLowest);
      for (int64_t j = block.begin; j < block.end; ++j)
        for (int i = 0; i < kVecs; ++i) {
          Vec v;
          memcpy(&v, block.scores + (j - block.begin) * kQueries + first + i * kLanes, sizeof v);
          if (!kPlain)
            v = seen(call.range.lanes(j), int32_t(first) + i * kLanes) ? v : splat(kLowest);
          highest[i] = max(v, highest[i]);
        }
      State& state = call.state;
      for (int i = 0; i < kVecs; ++i) {
        const int64_t at = first + i * kLanes;
        Vec before, sum, lost;
        memcpy(&before, state.highest + at, sizeof(Vec));
        memcpy(&sum, state.sum + at, sizeof(Vec));
        memcpy(&lost, state.lost + at, sizeof(Vec));
        highest[i] = max(ceil(highest[i] * call.exponential.high), before);
        const Vec factor = scale_by_power(splat(1.0f), before - highest[i]);
        sum *= factor;
        lost *= factor;
        memcpy(state.highest + at, &highest[i], sizeof(Vec));
        memcpy(state.sum + at, &sum, sizeof(Vec));
        memcpy(state.lost + at, &lost, sizeof(Vec));
        memcpy(state.rescale + at, &factor, sizeof(Vec));
        block.rescale |= any_lane_differs(factor, 1.0f);
      }
    }
  };

  // Turns the block's scores into P^T and adds them up, some keys and columns at a time.
  struct Weigh {
    const Call& call;
    const Block& block;
    int64_t column = block.part.begin, key = block.begin;

    bool operator()() {
      if (column >= block.part.end) return false;
      const int64_t last = key + call.unit < block.end ? key + call.unit : block.end;
      int64_t next = column;
      on_columns(block, next, [&](auto vecs, auto plain) ALWAYS_INLINE {
        weigh<decltype(vecs)::value, decltype(plain)::value>(column, key, last);
      });
      key = last;
      if (key == block.end) {
        key = block.begin;
        column = next;
      }
      return true;
    }

    template <int kVecs, int kPlain>
    void weigh(int64_t first, int64_t begin, int64_t end) {
      State& state = call.state;
      Vec highest[kVecs], sum[kVecs], lost[kVecs];
      for (int i = 0; i < kVecs; ++i) {
        memcpy(&highest[i], state.highest + first + i * kLanes, sizeof(Vec));
        memcpy(&sum[i], state.sum + first + i * kLanes, sizeof(Vec));
        memcpy(&lost[i], state.lost + first + i * kLanes, sizeof(Vec));
      }
      const auto weight = [&](int64_t j, int i) ALWAYS_INLINE {
        Vec v;
        memcpy(&v, block.scores + (j - block.begin) * kQueries + first + i * kLanes, sizeof v);
        Vec p = call.exponential(v, highest[i], Vec{});
        if (!kPlain)
          p = seen(call.range.lanes(j), int32_t(first) + i * kLanes) ? p : Vec{};
        const Vec before = sum[i];
        sum[i] += p;
        // What the addition lost: in float32 it would grow with the length of the sequence.
        if (Engine::kExact) lost[i] += p - (sum[i] - before);
        if (!kPlain && call.dropout.on)
          p *= call.dropout(j, call.range.query + first + i * kLanes);
        return p;
      };
      for (int64_t j = begin; j < end; j += Engine::kPair) {
        uint32_t* const to = call.p + (j - block.begin) / Engine::kPair * kQueries + first;
        for (int i = 0; i < kVecs; ++i) {
          const Vec p = weight(j, i);
          if constexpr (Engine::kPair == 2)
            store_pair<Engine>(to + i * kLanes, p, j + 1 < end ? weight(j + 1, i) : Vec{});
          else
            memcpy(to + i * kLanes, &p, sizeof p);
        }
      }
      for (int i = 0; i < kVecs; ++i) {
        memcpy(state.sum + first + i * kLanes, &sum[i], sizeof(Vec));
        memcpy(state.lost + first + i * kLanes, &lost[i], sizeof(Vec));
      }
    }
  };

  static void finish(const Attention& a, const AttentionSequence& s, int64_t head,
                     const Range& range, const State& state, const Shape<Engine>& shape,
                     const Scratch& scratch) {
    alignas(64) float factor[kQueries] = {};
    for (int64_t i = 0; i < range.queries; ++i) {
      double highest = state.highest[i], sum = double(state.sum[i]) + state.lost[i], rescale = 1;
      if (a.sink) {
        const double sink = a.sink[head] * kLog2eDouble;
        const double above = sink > highest ? sink : highest;
        rescale = __builtin_exp2(highest - above);
        sum = sum * rescale + __builtin_exp2(sink - above);
        highest = above;
      }
      factor[i] = sum > 0 || sum != sum ? float(rescale / sum) : 0.0f;
      const double exact = sum > 0 || sum != sum ? highest * kLn2 + log(sum) : -__builtin_inf();
      const int64_t at = statistics(a, s, head, range.query + i);
      a.lse[at] = float(exact);
      if (a.lse_remainder) a.lse_remainder[at] = sum > 0 ? float(exact - double(a.lse[at])) : 0.0f;
    }
    store_turned<X>(scratch.out, kQueries, factor, range.queries, shape.size,
                    output<X>(a.out, s.output_row + range.query, a.heads, head, shape.size),
                    a.heads * shape.size);
  }
};

}  // namespace
