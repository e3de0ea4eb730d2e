#include "adafactor_step/adafactor_step_cpu.h"

#include <algorithm>
#include <cmath>

#include "common/cpu.h"
#include "common/parallel.h"
#include "common/workspace.h"

namespace {

const AdafactorKernels& kernels() { return PICK_TABLE(adafactor); }

constexpr int64_t kPiece = 131072;      // elements that a thread takes at a time, about
constexpr int64_t kReduceCols = 256;    // columns whose sums a thread reduces at a time
constexpr int64_t kBytesPerElement = 28;  // fp32, all passes

// A tensor of so many elements passes through all its passes on one thread, in that core's cache.
constexpr int64_t kSmall = 65536;
// Larger ones together, up to so many elements: pass by pass on all threads, in the shared cache.
constexpr int64_t kWave = 2 << 20;

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// One tensor in pieces, whose bounds follow from its shape: blocks of a matrix, or whole matrices
// where they are small. The sums of each piece have a place of their own.
class Job {
 public:
  explicit Job(const FactorTensor& tensor) : t_(tensor), factored_(tensor.col_var != nullptr) {
    block_cols_ = std::min(t_.cols, factored_ ? kFactorCols : kPiece / 8);
    block_rows_ = std::min(t_.rows, std::max<int64_t>(kPiece / block_cols_, 1));
    row_blocks_ = blocks(t_.rows, block_rows_);
    col_blocks_ = blocks(t_.cols, block_cols_);
    if (row_blocks_ * col_blocks_ == 1)
      together_ = std::clamp<int64_t>(kPiece / (t_.rows * t_.cols), 1, t_.matrices);
    pieces_ = blocks(t_.matrices, together_) * row_blocks_ * col_blocks_;
  }

  int64_t numel() const { return t_.matrices * t_.rows * t_.cols; }
  int64_t pieces() const { return pieces_; }
  // For each matrix one item for its rows, and some for its columns.
  int64_t reductions() const {
    return factored_ ? t_.matrices * (1 + blocks(t_.cols, kReduceCols)) : 0;
  }

  int64_t scratch() const {
    int64_t bytes = pieces_ * int64_t(sizeof(FactorSquares));
    if (factored_)
      bytes += t_.matrices * (t_.rows * (8 * col_blocks_ + 4) + t_.cols * (8 * row_blocks_ + 4));
    return int64_t(Workspace::padded(bytes));
  }
  void place(char* memory) {
    squares_ = reinterpret_cast<FactorSquares*>(memory);
    row_sums_ = reinterpret_cast<double*>(squares_ + pieces_);
    col_sums_ = row_sums_ + t_.matrices * t_.rows * col_blocks_;
    row_roots_ = reinterpret_cast<float*>(col_sums_ + t_.matrices * t_.cols * row_blocks_);
    col_roots_ = row_roots_ + t_.matrices * t_.rows;
  }

  void sums(int64_t piece, const FactorOptions& options) const {
    if (!factored_) return;
    each_block(piece, [&](const FactorBlock& b, int64_t row_block, int64_t col_block) {
      double* rows = row_sums_ + (b.matrix * t_.rows + b.row_begin) * col_blocks_ + col_block;
      double* cols = col_sums_ + (b.matrix * row_blocks_ + row_block) * t_.cols + b.col_begin;
      kernels().sums(t_, options, b, rows, col_blocks_, cols);
    });
  }

  void reduce(int64_t item) const {
    const int64_t each = 1 + blocks(t_.cols, kReduceCols);
    const int64_t matrix = item / each, part = item % each;
    if (part == 0)
      reduce_rows(matrix);
    else
      reduce_cols(matrix, (part - 1) * kReduceCols, std::min(part * kReduceCols, t_.cols));
  }

  void squares(int64_t piece, const FactorOptions& options) const {
    FactorSquares total{};
    each_block(piece, [&](const FactorBlock& b, int64_t, int64_t) {
      const FactorSquares part = kernels().squares(t_, options, b, row_roots(b), col_roots(b));
      total.update += part.update;
      total.weight += part.weight;
    });
    squares_[piece] = total;
  }

  // The squares of all pieces are known: how far to go along the update.
  void scale() {
    FactorSquares total{};
    for (int64_t piece = 0; piece < pieces_; ++piece) {
      total.update += squares_[piece].update;
      total.weight += squares_[piece].weight;
    }
    const double count = double(numel());
    const double size = std::max(t_.eps2, std::sqrt(total.weight / count));
    const double over = std::sqrt(total.update / count) / t_.clip;
    step_ = float(t_.rate * size / (over <= 1 ? 1 : over));  // NaN goes on into the weights
  }

  void apply(int64_t piece, const FactorOptions& options) const {
    each_block(piece, [&](const FactorBlock& b, int64_t, int64_t) {
      kernels().apply(t_, options, b, row_roots(b), col_roots(b), step_);
    });
  }

 private:
  template <class F>
  void each_block(int64_t piece, F&& f) const {
    const int64_t of_matrix = row_blocks_ * col_blocks_;
    const int64_t first = piece / of_matrix * together_;
    const int64_t row_block = piece % of_matrix / col_blocks_, col_block = piece % col_blocks_;
    FactorBlock b;
    b.row_begin = row_block * block_rows_;
    b.row_end = std::min(b.row_begin + block_rows_, t_.rows);
    b.col_begin = col_block * block_cols_;
    b.col_end = std::min(b.col_begin + block_cols_, t_.cols);
    const int64_t last = std::min(first + together_, t_.matrices);
    for (b.matrix = first; b.matrix < last; ++b.matrix) f(b, row_block, col_block);
  }

  const float* row_roots(const FactorBlock& b) const {
    return factored_ ? row_roots_ + b.matrix * t_.rows + b.row_begin : nullptr;
  }
  const float* col_roots(const FactorBlock& b) const {
    return factored_ ? col_roots_ + b.matrix * t_.cols + b.col_begin : nullptr;
  }

  // The mean of the row factors goes into the roots of the rows.
  void reduce_rows(int64_t matrix) const {
    double* sums = row_sums_ + matrix * t_.rows * col_blocks_;
    if (col_blocks_ > 1)
      for (int64_t row = 0; row < t_.rows; ++row) {
        double sum = 0;
        for (int64_t k = 0; k < col_blocks_; ++k) sum += sums[row * col_blocks_ + k];
        sums[row] = sum;
      }
    float* factors = t_.row_var + matrix * t_.rows;
    kernels().move(factors, sums, t_.rows, double(t_.cols), t_.new_share);
    double sum = 0;
    for (int64_t row = 0; row < t_.rows; ++row) sum += double(factors[row]);
    const double numerator = std::sqrt(std::max(sum / double(t_.rows), t_.eps1));
    kernels().inverse_roots(factors, t_.rows, numerator, row_roots_ + matrix * t_.rows);
  }

  void reduce_cols(int64_t matrix, int64_t begin, int64_t end) const {
    double* sums = col_sums_ + matrix * row_blocks_ * t_.cols;
    for (int64_t k = 1; k < row_blocks_; ++k)
      for (int64_t j = begin; j < end; ++j) sums[j] += sums[k * t_.cols + j];
    float* factors = t_.col_var + matrix * t_.cols + begin;
    kernels().move(factors, sums + begin, end - begin, double(t_.rows), t_.new_share);
    kernels().inverse_roots(factors, end - begin, 1, col_roots_ + matrix * t_.cols + begin);
  }

  FactorTensor t_;
  bool factored_;
  int64_t block_rows_, block_cols_, row_blocks_, col_blocks_, together_ = 1, pieces_;
  float step_ = 0;
  FactorSquares* squares_ = nullptr;
  double *row_sums_ = nullptr, *col_sums_ = nullptr;  // [row][column block], [row block][column]
  float *row_roots_ = nullptr, *col_roots_ = nullptr;
};

// All passes over one tensor, on this thread.
void step_small(Job& job, const FactorOptions& options) {
  for (int64_t piece = 0; piece < job.pieces(); ++piece) job.sums(piece, options);
  for (int64_t item = 0; item < job.reductions(); ++item) job.reduce(item);
  for (int64_t piece = 0; piece < job.pieces(); ++piece) job.squares(piece, options);
  job.scale();
  for (int64_t piece = 0; piece < job.pieces(); ++piece) job.apply(piece, options);
}

// f(job, item) for the items of all jobs laid end to end, each thread getting an equal share of
// neighbours; with `backwards` from its last one to its first.
template <class Count, class F>
void each_item(std::vector<Job>& jobs, size_t first, size_t last, int64_t elements, int threads,
               bool backwards, Count&& count, F&& f) {
  std::vector<int64_t> ends;
  for (size_t i = first; i < last; ++i)
    ends.push_back((ends.empty() ? 0 : ends.back()) + count(jobs[i]));
  parallel_for(threads, ends.back(), elements * 4, [&](int64_t begin, int64_t end) {
    const auto call = [&](size_t i, int64_t item) {
      f(jobs[first + i], item - (i ? ends[i - 1] : 0));
    };
    const int64_t start = backwards ? end - 1 : begin;
    size_t i = size_t(std::upper_bound(ends.begin(), ends.end(), start) - ends.begin());
    if (backwards) {
      for (int64_t item = start; item >= begin; --item) {
        while (i > 0 && item < ends[i - 1]) --i;
        call(i, item);
      }
    } else {
      for (int64_t item = start; item < end; ++item) {
        while (item >= ends[i]) ++i;
        call(i, item);
      }
    }
  });
}

// Forwards, backwards, forwards: each pass begins with what the one before it left in the cache.
void step_wave(std::vector<Job>& jobs, size_t first, size_t last, const FactorOptions& options,
               int threads) {
  int64_t elements = 0;
  for (size_t i = first; i < last; ++i) elements += jobs[i].numel();
  const auto pass = [&](bool backwards, auto count, auto f) {
    each_item(jobs, first, last, elements, threads, backwards, count, f);
  };
  const auto pieces = [](const Job& job) { return job.pieces(); };
  pass(false, pieces, [&](const Job& job, int64_t piece) { job.sums(piece, options); });
  pass(false, [](const Job& job) { return job.reductions(); },
       [](const Job& job, int64_t item) { job.reduce(item); });
  pass(true, pieces, [&](const Job& job, int64_t piece) { job.squares(piece, options); });
  for (size_t i = first; i < last; ++i) jobs[i].scale();
  pass(false, pieces, [&](const Job& job, int64_t piece) { job.apply(piece, options); });
}

}  // namespace

void adafactor_step(const std::vector<FactorTensor>& tensors, const FactorOptions& options,
                    int threads) {
  std::vector<Job> small, large;
  std::vector<int64_t> before;  // elements of the small tensors up to each
  int64_t elements = 0, small_scratch = 0;
  for (const auto& tensor : tensors) {
    const int64_t numel = tensor.matrices * tensor.rows * tensor.cols;
    if (numel == 0) continue;
    if (numel > kSmall) {
      large.emplace_back(tensor);
      continue;
    }
    small.emplace_back(tensor);
    before.push_back(elements);
    elements += numel;
    small_scratch = std::max(small_scratch, small.back().scratch());
  }

  std::vector<size_t> waves(1, 0);  // bounds among the large tensors
  int64_t wave_scratch = 0;
  while (waves.back() < large.size()) {
    size_t last = waves.back();
    int64_t scratch = 0, sum = 0;
    do {
      scratch += large[last].scratch();
      sum += large[last++].numel();
    } while (last < large.size() && sum + large[last].numel() <= kWave);
    wave_scratch = std::max(wave_scratch, scratch);
    waves.push_back(last);
  }

  Workspace memory;
  const size_t for_waves = memory.plan(wave_scratch);
  const size_t for_small = memory.plan(small_scratch * threads);
  memory.take();

  // A share of the small tensors holds about as many elements as the next.
  if (!small.empty())
    parallel_for(threads, threads, elements * kBytesPerElement, [&](int64_t begin, int64_t end) {
      const auto bound = [&](int64_t share) {
        return std::lower_bound(before.begin(), before.end(), elements * share / threads) -
               before.begin();
      };
      const int64_t last = end == threads ? int64_t(small.size()) : bound(end);
      for (int64_t i = bound(begin); i < last; ++i) {
        small[size_t(i)].place(memory[for_small + size_t(begin * small_scratch)]);
        step_small(small[size_t(i)], options);
      }
    });

  for (size_t wave = 0; wave + 1 < waves.size(); ++wave) {
    char* at = memory[for_waves];
    for (size_t i = waves[wave]; i < waves[wave + 1]; ++i) {
      large[i].place(at);
      at += large[i].scratch();
    }
    step_wave(large, waves[wave], waves[wave + 1], options, threads);
  }
}
