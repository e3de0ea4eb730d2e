// levels: portable avx2 avx512 avx512bf16 amx
#include "common/level.h"
#include "common/packing.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace {

constexpr float kLowest = -3.4028234663852886e38f;

inline float highest(Vec v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// The first `count` lanes of v, the others `rest`.
ALWAYS_INLINE inline Vec keep(Vec v, int64_t count, float rest) {
  return lane_numbers() < int32_t(count) ? v : splat(rest);
}

template <class Engine, class X>
struct LinearCrossEntropyOf {
  using A = LinearCrossEntropy;
  using C = LinearCrossEntropyChunk;
  using T = typename X::T;
  using Element = typename Engine::Element;  // of the products
  // X is the dtype of the tensors, D that of the gradients of logits.
  template <class E, class = void>
  struct Narrow {
    using D = F32;
  };
  template <class Unused>
  struct Narrow<uint16_t, Unused> {
    using D = BF16;
  };
  using D = typename Narrow<Element>::D;
  static constexpr int64_t kPanel = ::kPanel<Engine>;
  static constexpr int64_t kBlockWords = kVocabularyBlock / Engine::kPair;

  static int64_t words(int64_t elements) {
    return round_up((elements + Engine::kPair - 1) / Engine::kPair, 16);
  }
  static int64_t panels(int64_t size) { return (size + kPanel - 1) / kPanel; }
  static int64_t padded(int64_t rows) { return round_up(rows, Engine::kRowStep); }
  static int64_t columns(const A& a) { return round_up(a.size, 16); }
  static int64_t panel_columns(const A& a, int64_t panel) {
    const int64_t left = columns(a) - panel * kPanel;
    return left < kPanel ? left : kPanel;
  }
  static int64_t block_columns(const A& a, int64_t block) {
    const int64_t left = a.vocabulary - block * kVocabularyBlock;
    return left < kVocabularyBlock ? left : kVocabularyBlock;
  }
  static uint32_t* words_at(void* base, int64_t word) {
    return static_cast<uint32_t*>(base) + word;
  }
  static typename D::T* dlogits_at(const C& c, int64_t slot, int64_t row) {
    return static_cast<typename D::T*>(c.dlogits) +
           (slot * padded(c.rows) + row) * kVocabularyBlock;
  }
  static const T* weight_at(const A& a, int64_t block) {
    return static_cast<const T*>(a.weight) + block * kVocabularyBlock * a.weight_stride;
  }

  static LinearCrossEntropySizes sizes(int64_t rows, int64_t size) {
    return {4 * padded(rows) * words(size),
            4 * panels(size) * words(rows) * kPanel,
            4 * padded(rows) * kVocabularyBlock,
            int64_t(sizeof(typename D::T)) * padded(rows) * kVocabularyBlock,
            4 * panels(size) * kBlockWords * kPanel,
            4 * words(size) * kVocabularyBlock,
            4 * words(rows) * kWeightBlock};
  }

  static void pack_hidden(const A& a, const C& c, int64_t column, bool paired) {
    const T* const hidden = static_cast<const T*>(a.hidden) + c.first * a.hidden_stride;
    if (column == 0)
      pack_rows<Engine, X>(hidden, a.hidden_stride, c.rows, a.size, padded(c.rows), words(a.size),
                           words_at(c.hidden_rows, 0));
    if (!paired) return;
    for (int64_t j = column; j < column + kPackedColumns && j < a.size; j += kPanel)
      pack_paired<Engine, X>(hidden + j, a.hidden_stride, c.rows, a.size - j, words(c.rows), kPanel,
                             words_at(c.hidden_paired, j * words(c.rows)));
  }

  static void logits(const A& a, const C& c, int64_t block, float* logits, void* turned_weight) {
    const int64_t depth = words(a.size), count = block_columns(a, block), rows = padded(c.rows);
    Engine::begin();
    for (int64_t j = 0; j < count; j += kPanel)
      pack_turned<Engine, X>(weight_at(a, block) + j * a.weight_stride, a.weight_stride, count - j,
                             a.size, kPanel, depth, words_at(turned_weight, j * depth), kPanel);
    for (int64_t i = 0; i < rows; i += kTokenBlock) {
      const int64_t most = rows - i < kTokenBlock ? rows - i : kTokenBlock;
      for (int64_t j = 0; j < count; j += kPanel)
        product<Engine, kSet>(most, kPanel, depth, words_at(c.hidden_rows, i * depth), depth,
                              words_at(turned_weight, j * depth), kPanel,
                              logits + i * kVocabularyBlock + j, kVocabularyBlock);
      for (int64_t row = i; row < i + most && row < c.rows; ++row)
        finish_row(a, c, block, row, count, logits + row * kVocabularyBlock);
    }
    Engine::end();
  }

  // Bias and softcap, and what the loss needs of this part of the row.
  static void finish_row(const A& a, const C& c, int64_t block, int64_t row, int64_t count,
                         float* z) {
    const T* const bias =
        a.bias ? static_cast<const T*>(a.bias) + block * kVocabularyBlock : nullptr;
    const float cap = a.softcap, inverse = cap > 0 ? 1 / cap : 0;
    Vec top = splat(kLowest), total = {};
    for (int64_t j = 0; j < count; j += kLanes) {
      const int64_t n = count - j < kLanes ? count - j : kLanes;
      Vec v = load<F32>(z + j);
      if (bias) v += n == kLanes ? load<X>(bias + j) : load<X>(bias + j, n);
      if (cap > 0) v = cap * tanh(v * inverse);
      if (n < kLanes) v = keep(v, n, kLowest);
      store<F32>(z + j, v);
      top = max(top, v);
      if (a.label_smoothing > 0) total += n < kLanes ? keep(v, n, 0) : v;
    }
    if (!a.loss) return;
    const float most = highest(top);
    Vec sums[2] = {};
    for (int64_t j = 0; j < count; j += kLanes)
      sums[j / kLanes % 2] += exponential(load<F32>(z + j) - most);
    const int64_t at = block * c.rows + row;
    c.top[at] = most;
    c.sum[at] = sum(sums[0] + sums[1]);
    if (a.label_smoothing > 0) c.total[at] = sum(total);
    const int64_t target = a.target[c.first + row] - block * kVocabularyBlock;
    if (target >= 0 && target < count) c.target_logit[row] = z[target];
  }

  static void pack_weight(const A& a, const C& c, int64_t block, int64_t slot) {
    for (int64_t panel = 0; panel < panels(a.size); ++panel)
      pack_paired<Engine, X>(
          weight_at(a, block) + panel * kPanel, a.weight_stride, block_columns(a, block),
          a.size - panel * kPanel, kBlockWords, kPanel,
          words_at(c.weight_paired, (slot * panels(a.size) + panel) * kBlockWords * kPanel));
  }

  // d = g (p (1 + 2 z_loss lse) - (1 - s) [target] - s / V), times 1 - (z / softcap)^2.
  static void dlogits(const A& a, const C& c, int64_t block, int64_t slot, int64_t begin,
                      int64_t end) {
    const int64_t count = block_columns(a, block);
    const bool capped = a.softcap > 0;
    const float inverse = capped ? 1 / a.softcap : 0;
    for (int64_t row = begin; row < end; ++row) {
      const float* const z =
          c.logits + (block * padded(c.rows) + row) * kVocabularyBlock;
      typename D::T* const d = dlogits_at(c, slot, row);
      const double lse = a.lse[c.first + row], g = a.upstream ? a.upstream[c.first + row] : 1;
      const double more = 2 * a.z_loss * lse, even = a.label_smoothing / double(a.vocabulary);
      // What rounding takes from lse comes back as a factor.
      const float shift = float(lse);
      const Vec factor = splat(float(g * (1 + more) * (1 + (double(shift) - lse))));
      const Vec less = splat(float(-g * even));
      for (int64_t j = 0; j < kVocabularyBlock; j += kLanes) {
        Vec v = {};
        if (j < count) {
          const Vec x = load<F32>(z + j);
          v = fma(exponential(x - shift), factor, less);
          if (capped) {
            const Vec y = x * inverse;
            v *= 1.0f - y * y;
          }
          if (count - j < kLanes) v = keep(v, count - j, 0);
        }
        store<D>(d + j, v);
      }
      const int64_t target = a.target[c.first + row] - block * kVocabularyBlock;
      if (target >= 0 && target < count) {
        // p - 1 without cancellation, where the model is sure.
        const double x = z[target], y = x * inverse;
        const double less_one = __builtin_expm1(x - lse);
        double v = g * (less_one + (less_one + 1) * more + a.label_smoothing - even);
        if (capped) v *= 1 - y * y;
        store<D>(d + target, splat(float(v)), 1);
      }
    }
  }

  static void dweight(const A& a, const C& c, int64_t block, int64_t slot, int64_t part,
                      void* turned_dlogits) {
    const int64_t at = part * kWeightBlock, left = block_columns(a, block) - at;
    if (left <= 0) return;
    const int64_t count = left < kWeightBlock ? left : kWeightBlock, row_words = words(c.rows);
    const int64_t first = block * kVocabularyBlock + at;
    const typename D::T* const d = dlogits_at(c, slot, 0) + at;
    if (a.dbias) sum_columns(c, d, count, a.dbias + first);
    if (!a.dweight) return;
    Engine::begin();
    pack_paired_turned<Engine, D>(d, kVocabularyBlock, c.rows, kWeightBlock, row_words,
                                  kWeightBlock, words_at(turned_dlogits, 0));
    for (int64_t panel = 0; panel < panels(a.size); ++panel) {
      const auto add = c.first == 0 ? product<Engine, kSet> : product<Engine, kAdd>;
      add(padded(count), panel_columns(a, panel), row_words, words_at(turned_dlogits, 0),
          row_words, words_at(c.hidden_paired, panel * row_words * kPanel), kPanel,
          a.dweight + first * columns(a) + panel * kPanel, columns(a), nullptr, {});
    }
    Engine::end();
  }

  // In two levels: a long chain of sums would round.
  static void sum_columns(const C& c, const typename D::T* d, int64_t count, float* to) {
    for (int64_t j = 0; j < count; j += kLanes) {
      const int64_t n = count - j < kLanes ? count - j : kLanes;
      Vec all = c.first == 0 ? Vec{} : load<F32>(to + j, n);
      for (int64_t i = 0; i < c.rows; i += 32) {
        Vec some = {};
        for (int64_t row = i; row < i + 32 && row < c.rows; ++row)
          some += load<D>(d + row * kVocabularyBlock + j);
        all += some;
      }
      store<F32>(to + j, all, n);
    }
  }

  static void dhidden(const A& a, const C& c, bool first, int64_t slots, int64_t begin,
                      int64_t end) {
    Engine::begin();
    for (int64_t slot = 0; slot < slots; ++slot) {
      const uint32_t* const d = reinterpret_cast<const uint32_t*>(dlogits_at(c, slot, begin));
      for (int64_t panel = 0; panel < panels(a.size); ++panel) {
        const int64_t rows = padded(end - begin), count = panel_columns(a, panel);
        const uint32_t* const weight =
            words_at(c.weight_paired, (slot * panels(a.size) + panel) * kBlockWords * kPanel);
        float* const to = a.dhidden + (c.first + begin) * columns(a) + panel * kPanel;
        if constexpr (Engine::kExact) {
          // The sum over the vocabulary is long. A block is summed by itself first: a chain of the
          // product's short pieces would round more than torch's products do.
          alignas(64) float tile[kTokenBlock * kPanel];
          int64_t depth = kBlockWords;
          asm("" : "+r"(depth));  // for a constant GCC 12 warns of an overflow that cannot be
          product<Engine, kSet>(rows, count, depth, d, kBlockWords, weight, kPanel, tile,
                                kPanel);
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < count; j += kLanes) {
              Vec sum = load<F32>(tile + i * kPanel + j);
              if (!first || slot > 0) sum += load<F32>(to + i * columns(a) + j);
              store<F32>(to + i * columns(a) + j, sum);
            }
        } else {
          const auto add = first && slot == 0 ? product<Engine, kSet> : product<Engine, kAdd>;
          add(rows, count, kBlockWords, d, kBlockWords, weight, kPanel, to, columns(a), nullptr,
              {});
        }
      }
    }
    Engine::end();
  }

  static constexpr LinearCrossEntropyKernels table() {
    return {sizes, pack_hidden, logits, pack_weight, dlogits, dweight, dhidden};
  }
};

template <class X>
void scale_rows(const float* x, int64_t stride, int64_t cols, float factor, void* y,
                int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float* const from = x + i * stride;
    typename X::T* const to = static_cast<typename X::T*>(y) + i * cols;
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) store<X>(to + j, load<F32>(from + j) * factor);
    if (j < cols) store<X>(to + j, load<F32>(from + j, cols - j) * factor, cols - j);
  }
}

void scale(const float* x, int64_t stride, int64_t cols, float factor, void* y, int dtype,
           int64_t begin, int64_t end) {
  if (dtype == kFloat32)
    scale_rows<F32>(x, stride, cols, factor, y, begin, end);
  else if (dtype == kBFloat16)
    scale_rows<BF16>(x, stride, cols, factor, y, begin, end);
  else
    scale_rows<F16>(x, stride, cols, factor, y, begin, end);
}

template <class Bf16>
constexpr LinearCrossEntropyTable table() {
  return {{LinearCrossEntropyOf<FloatEngine, F32>::table(),
           LinearCrossEntropyOf<Bf16, BF16>::table(),
           LinearCrossEntropyOf<WidenedEngine, F16>::table()},
          scale};
}

}  // namespace

const LinearCrossEntropyTable AT_LEVEL(linear_cross_entropy) = table<BFloat16Engine>();
