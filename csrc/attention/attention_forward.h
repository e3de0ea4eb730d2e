// The forward of one block of queries; a part of attention_kernels.h.
//
// For each block of keys: S^T = K Q^T; the running maximum and sum of each query; P^T = 2^(S^T - max);
// O^T += V^T P^T. Exponents are taken to the base 2, and the running maximum is rounded up to a whole
// number: rescaling is then exact, seldom needed, and 2^(x - max) loses nothing to the subtraction.
#pragma once

namespace {

template <class Engine, class X>
struct Forward {
  static constexpr int64_t kQueries = kForwardQueries;

  struct Scratch {
    uint32_t *queries, *p;  // Q^T [words][kQueries]; P^T [keys in words][kQueries]
    float *scores, *out;    // S^T [kKeyBlock][kQueries]; O^T [shape.rows][kQueries]
    Scratch(void* memory, const Shape<Engine>& shape)
        : queries(static_cast<uint32_t*>(memory)),
          p(queries + shape.words * kQueries),
          scores(reinterpret_cast<float*>(p + kKeyBlock / Engine::kPair * kQueries)),
          out(scores + kKeyBlock * kQueries) {}
  };

  static int64_t scratch_bytes(const Shape<Engine>& shape) {
    return 4 * kQueries * (shape.words + kKeyBlock / Engine::kPair + kKeyBlock + shape.rows);
  }

  // A query's running maximum, its sum and what the sum lost to rounding, and what its output so far
  // is to be multiplied with.
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
    const int64_t at = key_head * a.packed_rows + s.packed;
    const uint32_t* const keys = static_cast<const uint32_t*>(a.packed_keys) + at * shape.words;
    const uint32_t* const values =
        static_cast<const uint32_t*>(a.packed_values) + at / kKeyBlock * shape.turned_block();

    Engine::begin();
    pack_turned<Engine, X>(q, a.q.row, range.queries, a.size, columns, shape.words,
                           scratch.queries, kQueries);
    State state;
    for (int64_t i = 0; i < kQueries; ++i) {
      state.highest[i] = kLowest;
      state.sum[i] = state.lost[i] = 0;
    }
    memset(scratch.out, 0, size_t(4 * shape.rows * kQueries));
    for (int64_t block_begin = range.begin / kKeyBlock * kKeyBlock; block_begin < range.end;
         block_begin += kKeyBlock) {
      int64_t begin = range.begin > block_begin ? range.begin : block_begin;
      begin = begin / Engine::kDepthStep * Engine::kDepthStep;
      const int64_t end =
          range.end < block_begin + kKeyBlock ? range.end : block_begin + kKeyBlock;
      const auto part = range.columns(begin, end, columns, 16);
      product<Engine, kSet>(round_up(end - begin, Engine::kRowStep), part.count(), shape.words,
                            keys + begin * shape.words, shape.words,
                            scratch.queries + part.begin, kQueries, scratch.scores + part.begin,
                            kQueries);
      const bool rescale = weigh(a, s, head, range, begin, end, part, scratch, state);
      const int64_t depth = round_up(end - begin, Engine::kDepthStep) / Engine::kPair;
      const uint32_t* const v = values + block_begin / kKeyBlock * shape.turned_block() +
                                (begin - block_begin) / Engine::kPair;
      const uint32_t* const p = scratch.p + part.begin;
      float* const out = scratch.out + part.begin;
      if (rescale)
        product<Engine, kScaleAdd>(shape.rows, part.count(), depth, v, shape.kTurnedWords, p,
                                   kQueries, out, kQueries, state.rescale + part.begin);
      else
        product<Engine, kAdd>(shape.rows, part.count(), depth, v, shape.kTurnedWords, p, kQueries,
                              out, kQueries);
    }
    Engine::end();
    finish(a, s, head, range, state, shape, scratch);
  }

  // Turns the scores of keys [begin, end) into P^T. Whether the output so far must be rescaled.
  static bool weigh(const Attention& a, const AttentionSequence& s, int64_t head,
                    const Range& range, int64_t begin, int64_t end, const Range::Columns& part,
                    const Scratch& scratch, State& state) {
    if (shaped(a)) shape_scores(a, scratch.scores, nullptr, (end - begin) * kQueries);
    const ToExponent<Engine> to_exponent(a);
    const Dropout dropout(a, s, head);
    const bool plain = range.all(begin, end) && !dropout.on;
    bool rescale = false;
    int64_t column = part.begin;
    const auto columns = [&](auto vecs, auto plain) {
      rescale |= weigh_columns<decltype(vecs)::value, decltype(plain)::value>(
          range, begin, end, column, to_exponent, dropout, scratch, state);
      column += decltype(vecs)::value * kLanes;
    };
    // Four registers at a time hide the latency of a maximum or a sum behind the others'.
    while (column + 4 * kLanes <= part.end)
      plain ? columns(Constant<4>(), Constant<1>()) : columns(Constant<4>(), Constant<0>());
    while (column < part.end) columns(Constant<16 / kLanes>(), Constant<0>());
    const int64_t from = (end - begin + Engine::kPair - 1) / Engine::kPair;
    const int64_t to = round_up(end - begin, Engine::kDepthStep) / Engine::kPair;
    memset(scratch.p + from * kQueries, 0, size_t(4 * (to - from) * kQueries));
    return rescale;
  }

  template <int kVecs, int kPlain>
  static bool weigh_columns(const Range& range, int64_t begin, int64_t end, int64_t column,
                            ToExponent<Engine> to_exponent, const Dropout& dropout, const Scratch& scratch,
                            State& state) {
    const float* const scores = scratch.scores + column;
    Vec highest[kVecs], sum[kVecs], lost[kVecs];
    for (int i = 0; i < kVecs; ++i) highest[i] = splat(kLowest);
    for (int64_t j = begin; j < end; ++j)
      for (int i = 0; i < kVecs; ++i) {
        Vec v;
        memcpy(&v, scores + (j - begin) * kQueries + i * kLanes, sizeof v);
        if (!kPlain)
          v = seen(range.lanes(j), int32_t(column) + i * kLanes) ? v : splat(kLowest);
        highest[i] = max(v, highest[i]);
      }
    bool rescale = false;
    for (int i = 0; i < kVecs; ++i) {
      float* const at = state.highest + column + i * kLanes;
      Vec before;
      memcpy(&before, at, sizeof before);
      highest[i] = max(ceil(highest[i] * to_exponent.high), before);
      const Vec factor = scale_by_power(splat(1.0f), before - highest[i]);
      memcpy(&sum[i], state.sum + column + i * kLanes, sizeof(Vec));
      memcpy(&lost[i], state.lost + column + i * kLanes, sizeof(Vec));
      sum[i] *= factor;
      lost[i] *= factor;
      memcpy(at, &highest[i], sizeof(Vec));
      memcpy(state.rescale + column + i * kLanes, &factor, sizeof factor);
      const Ints same = factor == 1.0f;
      for (int lane = 0; lane < kLanes; ++lane) rescale |= !same[lane];
    }
    const auto weight = [&](int64_t j, int i) ALWAYS_INLINE {
      Vec v;
      memcpy(&v, scores + (j - begin) * kQueries + i * kLanes, sizeof v);
      const Vec n = round(v * to_exponent.high);
      Vec p = scale_by_power(power_of_two<Engine::kDegree>(to_exponent(v, n)), n - highest[i]);
      if (!kPlain) p = seen(range.lanes(j), int32_t(column) + i * kLanes) ? p : Vec{};
      const Vec before = sum[i];
      sum[i] += p;
      // What the addition lost: in float32 it would grow with the length of the sequence.
      if (Engine::kDegree == 6) lost[i] += p - (sum[i] - before);
      if (!kPlain && dropout.on) p *= dropout(j, range.query + column + i * kLanes);
      return p;
    };
    for (int64_t j = begin; j < end; j += Engine::kPair) {
      uint32_t* const to = scratch.p + (j - begin) / Engine::kPair * kQueries + column;
      for (int i = 0; i < kVecs; ++i) {
        const Vec p = weight(j, i);
        if constexpr (Engine::kPair == 2)
          store_pair<Engine>(to + i * kLanes, p, j + 1 < end ? weight(j + 1, i) : Vec{});
        else
          memcpy(to + i * kLanes, &p, sizeof p);
      }
    }
    for (int i = 0; i < kVecs; ++i) {
      memcpy(state.sum + column + i * kLanes, &sum[i], sizeof(Vec));
      memcpy(state.lost + column + i * kLanes, &lost[i], sizeof(Vec));
    }
    return rescale;
  }

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
      if (a.rest) a.rest[at] = sum > 0 ? float(exact - double(a.lse[at])) : 0.0f;
    }
    store_turned<X>(scratch.out, kQueries, factor, range.queries, shape.size,
                    output<X>(a.out, s.output_row + range.query, a.heads, head, shape.size),
                    a.heads * shape.size);
  }
};

}  // namespace
