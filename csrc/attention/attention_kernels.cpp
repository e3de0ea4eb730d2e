// levels: portable avx2 avx512 avx512bf16 amx
// What forward and backward share, and the table.
#include "attention/attention.h"
#include "common/level.h"
#include "common/packing.h"

extern "C" double log(double);

namespace {

constexpr double kLog2eDouble = 1.4426950408889634, kLn2 = 0.6931471805599453;
// A running maximum before the first key: finite, so that differences are numbers.
constexpr float kLowest = -1e30f;

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Which keys the queries of one block see.
struct Range {
  int64_t query, queries;     // the block's first query and how many
  int64_t shift, left, right;  // query i sees keys i + shift - left to i + shift + right
  int64_t begin, end;         // keys that any of them sees

  Range(const Attention& a, const AttentionSequence& s, int64_t block, int64_t block_queries)
      : query(block * block_queries),
        queries(s.rows - query < block_queries ? s.rows - query : block_queries),
        shift(s.cols - s.rows),
        // Beyond the sequence a limit is none; so int32 lanes hold what follows from it.
        left(a.left < 0 || a.left > s.rows + s.cols ? s.rows + s.cols : a.left),
        right(a.right < 0 || a.right > s.rows + s.cols ? s.rows + s.cols : a.right) {
    const int64_t low = query + shift - left, high = query + queries + shift + right;
    begin = low < 0 ? 0 : low;
    end = high > s.cols ? s.cols : high;
    if (end < begin) end = begin;
  }

  // Whether every query sees every key of [first, last).
  bool all(int64_t first, int64_t last) const {
    return last - 1 <= query + shift + right && first >= query + queries - 1 + shift - left;
  }

  // The block's columns (queries counted from `query`, in sixteens, below `columns`) that see any
  // key of [first, last): what lies outside is not computed.
  struct Columns {
    int64_t begin, end;
    int64_t count() const { return end - begin; }
  };
  Columns columns(int64_t first, int64_t last, int64_t columns, int64_t step) const {
    const int64_t low = first - shift - right - query, high = last - shift + left - query;
    return {low <= 0 ? 0 : low / step * step, high >= columns ? columns : round_up(high, step)};
  }

  // The keys of the packed block that begins at key `base` which any query sees, from a multiple of
  // `step` on, and the queries that see any of them.
  struct Block {
    int64_t base, begin, end;
    Columns part;
    int64_t keys() const { return end - begin; }
  };
  Block block(int64_t base, int64_t all_columns, int64_t step, int64_t column_step) const {
    const int64_t first = (begin > base ? begin : base) / step * step;
    const int64_t last = end < base + kKeyBlock ? end : base + kKeyBlock;
    return {base, first, last, columns(first, last, all_columns, column_step)};
  }
  int64_t first_base() const { return begin / kKeyBlock * kKeyBlock; }

  // The lanes (queries from `query` on) that see key j: from .first to .last.
  struct Lanes {
    int32_t first, last;
  };
  Lanes lanes(int64_t j) const {
    const int64_t middle = j - shift - query;
    return {int32_t(middle - right), int32_t(middle + left)};
  }
};

template <class T>
const T* element(const AttentionView& view, int64_t batch, int64_t row, int64_t head) {
  return static_cast<const T*>(view.data) + batch * view.batch + row * view.row + head * view.head;
}

inline int64_t statistics(const Attention& a, const AttentionSequence& s, int64_t head,
                          int64_t row) {
  return s.index * a.statistics_batch + head * a.statistics_head + s.first_row + row;
}

// Outputs are contiguous: (rows of all sequences, heads, size).
template <class X>
typename X::T* output(void* data, int64_t row, int64_t heads, int64_t head, int64_t size) {
  return static_cast<typename X::T*>(data) + (row * heads + head) * size;
}

template <class Engine>
struct Shape {
  int64_t size;           // D
  int64_t words;          // of D as a product's depth
  int64_t rows;           // D as a product's rows
  int64_t columns;        // D as a product's columns
  explicit Shape(int64_t d)
      : size(d),
        words(round_up(d, Engine::kDepthStep) / Engine::kPair),
        rows(round_up(d, Engine::kRowStep)),
        columns(round_up(d, 16)) {}

  static constexpr int64_t kTurnedWords = kKeyBlock / Engine::kPair;  // of a row of a turned block
  int64_t turned_block() const { return rows * kTurnedWords; }

  // Row `row` of packed rows, and the turned block that holds it.
  uint32_t* packed_row(void* packed, int64_t row) const {
    return static_cast<uint32_t*>(packed) + row * words;
  }
  uint32_t* packed_block(void* packed, int64_t row) const {
    return static_cast<uint32_t*>(packed) + row / kKeyBlock * turned_block();
  }
};

// Where a sequence's keys begin among the packed rows of all key heads.
inline int64_t first_packed(const Attention& a, const AttentionSequence& s, int64_t key_head) {
  return key_head * a.packed_rows + s.packed;
}

// Cuts a thread's scratch memory into pieces; of no memory, to know how much they take.
struct Cut {
  void* memory;
  int64_t words = 0;

  uint32_t* take(int64_t count) {
    uint32_t* const piece = memory ? static_cast<uint32_t*>(memory) + words : nullptr;
    words += count;
    return piece;
  }
  float* take_floats(int64_t count) { return reinterpret_cast<float*>(take(count)); }
};

// Keys beyond a block's own, which only fill a step of a product's depth, count as zero: in rows of
// `width` words, a row for each pair of keys.
template <class Engine>
inline void pad_depth(int64_t keys, int64_t width, uint32_t* paired) {
  const int64_t from = round_up(keys, Engine::kPair) / Engine::kPair;
  const int64_t to = round_up(keys, Engine::kDepthStep) / Engine::kPair;
  memset(paired + from * width, 0, size_t(4 * (to - from) * width));
}

// The words of dropout, one key and a register of queries at a time.
struct Dropout {
  Philox philox;
  uint32_t below, head, batch;
  float scale;
  bool on;

  Dropout(const Attention& a, const AttentionSequence& s, int64_t query_head)
      : philox{uint32_t(a.seed), uint32_t(a.seed >> 32)},
        below(a.drop_below),
        head(uint32_t(query_head)),
        batch(uint32_t(s.index)),
        scale(a.keep_scale),
        on(a.keep_scale != 0) {}

  // scale where (first query + lane, key) is kept, else 0.
  Vec operator()(int64_t key, int64_t first_query) const {
    const Bits none{};
    const Bits query = uint32_t(first_query) + reinterpret_cast<Bits>(lane_numbers());
    const Bits word = philox(none + uint32_t(key), query, none + head, none + batch);
    return word >= below ? splat(scale) : Vec{};
  }
};

inline Ints seen(const Range::Lanes& lanes, int32_t first_lane) {
  const Ints lane = lane_numbers() + first_lane;
  return (lane >= lanes.first) & (lane <= lanes.last);
}

// Scores that are not a positive multiple of q . k: s = scale * s, or softcap * tanh(scale * s /
// softcap), and then the derivative's factor 1 - tanh^2 into `slope`, if that is wanted.
inline void shape_scores(const Attention& a, float* scores, float* slope, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Vec s;
    memcpy(&s, scores + i, sizeof s);
    if (a.softcap > 0) {
      const Vec t = tanh(s * (a.scale / a.softcap));
      s = t * a.softcap;
      const Vec d = 1.0f - t * t;
      if (slope) memcpy(slope + i, &d, sizeof d);
    } else {
      s *= a.scale;
    }
    memcpy(scores + i, &s, sizeof s);
  }
}

inline bool shaped(const Attention& a) { return a.softcap > 0 || a.scale <= 0; }

// 2^(score * log2(e) - whole - fraction), with the scale in the factor where shape_scores has not
// been there. Of an exact engine `whole` is a whole number; else it is any, and fraction is 0.
template <class Engine>
struct Exponential {
  float high, low;  // the factor in two parts: in float32 the rounding of one would show

  explicit Exponential(const Attention& a) {
    const double factor = kLog2eDouble * (shaped(a) ? 1.0 : double(a.scale));
    high = float(factor);
    low = float(factor - high);
  }

  // Without a sum of large numbers that would be rounded: the nearest whole number is taken off the
  // exponent first, and put back as a power.
  ALWAYS_INLINE Vec operator()(Vec score, Vec whole, Vec fraction) const {
    if constexpr (!Engine::kExact) return coarse_power_of_two(fma(score, splat(high), -whole));
    const Vec n = round(fma(score, splat(high), -fraction));
    const Vec f = fma(score, splat(low), fma(score, splat(high), -n)) - fraction;
    return scale_by_power(power_of_two(f), n - whole);
  }
};

}  // namespace

#include "attention/attention_forward.h"
// after it, since it is longer:
#include "attention/attention_backward.h"

namespace {

template <class Engine, class X>
AttentionSizes sizes(int64_t size) {
  const Shape<Engine> shape(size);
  const typename Forward<Engine, X>::Scratch forward(nullptr, shape);
  const typename Backward<Engine, X>::Scratch backward(nullptr, shape);
  return {shape.words, shape.turned_block(), forward.bytes, backward.bytes};
}

template <class Engine, class X>
void pack(const Attention& a, const AttentionSequence& s, int64_t key_head, int64_t block,
          bool backward) {
  const Shape<Engine> shape(a.size);
  const int64_t row = block * kKeyBlock;
  const int64_t rows = s.cols - row < kKeyBlock ? s.cols - row : kKeyBlock;
  const int64_t at = first_packed(a, s, key_head) + row;
  using T = typename X::T;
  const T* k = element<T>(a.k, s.index, s.first_col + row, key_head);
  const T* v = element<T>(a.v, s.index, s.first_col + row, key_head);
  pack_rows<Engine, X>(k, a.k.row, rows, a.size, kKeyBlock, shape.words,
                       shape.packed_row(a.packed_keys, at));
  if (backward) {
    pack_rows<Engine, X>(v, a.v.row, rows, a.size, kKeyBlock, shape.words,
                         shape.packed_row(a.packed_values, at));
    pack_paired_turned<Engine, X>(k, a.k.row, rows, a.size, shape.kTurnedWords, shape.rows,
                                  shape.packed_block(a.packed_keys_turned, at));
  } else {
    pack_paired_turned<Engine, X>(v, a.v.row, rows, a.size, shape.kTurnedWords, shape.rows,
                                  shape.packed_block(a.packed_values, at));
  }
}

template <class Engine, class X>
constexpr AttentionKernels kernels() {
  return {sizes<Engine, X>, pack<Engine, X>, Forward<Engine, X>::run, Backward<Engine, X>::run,
          Backward<Engine, X>::finish};
}

}  // namespace

const AttentionKernels AT_LEVEL(attention)[3] = {kernels<FloatEngine, F32>(),
                                                 kernels<BFloat16Engine, BF16>(),
                                                 kernels<WidenedEngine, F16>()};
