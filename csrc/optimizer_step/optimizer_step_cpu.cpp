#include "optimizer_step/optimizer_step_cpu.h"

#include <algorithm>
#include <cmath>

#include "common/cpu.h"
#include "common/parallel.h"

namespace {

const StepKernels& kernels() { return PICK_TABLE(step); }

// Threads get whole chunks: no two of them write to one cache line or one 8-bit block.
constexpr int64_t kChunk = 2048;
constexpr int64_t kPiece = 1024;            // chunks that a sweep does in one go
constexpr int64_t kBytesPerElement = 28;  // fp32 Adam: four arrays read, three written

// All tensors laid end to end, in chunks: one parallel region, whose threads get equal shares
// whether the model is one flat buffer or thousands of small tensors.
class Chunks {
 public:
  template <class Tensors>
  explicit Chunks(const Tensors& tensors) : first_(1, 0) {
    for (const auto& tensor : tensors) {
      numels_.push_back(tensor.numel);
      first_.push_back(first_.back() + (tensor.numel + kChunk - 1) / kChunk);
    }
  }
  int64_t count() const { return first_.back(); }
  int64_t first(size_t tensor) const { return first_[tensor]; }

  // Calls f(tensor, first chunk, first element, last element + 1) for pieces of at most `most`
  // chunks, from the last one to the first.
  template <class F>
  void backwards(int64_t begin, int64_t end, int64_t most, F&& f) const {
    size_t i = size_t(std::upper_bound(first_.begin(), first_.end(), end - 1) - first_.begin());
    while (end > begin) {
      --i;
      const int64_t low = std::max(begin, first_[i]);
      while (end > low) {
        const int64_t from = std::max(low, end - most);
        f(i, from, (from - first_[i]) * kChunk, std::min((end - first_[i]) * kChunk, numels_[i]));
        end = from;
      }
    }
  }

  // The same for each chunk, from the first one to the last.
  template <class F>
  void forwards(int64_t begin, int64_t end, F&& f) const {
    size_t i = size_t(std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin() - 1);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (first_[i + 1] <= chunk) ++i;
      const int64_t from = (chunk - first_[i]) * kChunk;
      f(i, chunk, from, std::min(from + kChunk, numels_[i]));
    }
  }

 private:
  std::vector<int64_t> first_, numels_;
};

}  // namespace

void optimizer_step(Rule rule, const std::vector<StepTensor>& tensors, const StepOptions& options,
                    std::vector<StepSums>& sums, int threads) {
  const Chunks chunks(tensors);
  const auto step = kernels().step[rule];
  std::vector<StepSums> parts(rule == kLambNorms ? size_t(chunks.count()) : 0);
  parallel_for(threads, chunks.count(), chunks.count() * kChunk * kBytesPerElement,
               [&](int64_t begin, int64_t end) {
                 // The norm went forwards: the end of the gradients is still in the cache.
                 const int64_t piece = parts.empty() ? kPiece : 1;
                 chunks.backwards(begin, end, piece,
                                  [&](size_t i, int64_t at, int64_t from, int64_t to) {
                                    StepSums* sum = parts.empty() ? nullptr : &parts[size_t(at)];
                                    step(tensors[i], options, from, to, sum);
                                  });
               });
  if (rule != kLambNorms) return;
  sums.assign(tensors.size(), {});
  for (size_t i = 0; i < tensors.size(); ++i)
    for (int64_t chunk = chunks.first(i); chunk < chunks.first(i + 1); ++chunk) {
      sums[i].weight += parts[size_t(chunk)].weight;
      sums[i].update += parts[size_t(chunk)].update;
    }
}

std::pair<double, int64_t> squared_norm(const std::vector<NormTensor>& tensors, int threads) {
  const Chunks chunks(tensors);
  const auto squared_sum = kernels().squared_sum;
  std::vector<double> parts(size_t(chunks.count()));
  const int64_t bytes = chunks.count() * kChunk * 4;
  parallel_for(threads, chunks.count(), bytes, [&](int64_t begin, int64_t end) {
    chunks.forwards(begin, end, [&](size_t i, int64_t chunk, int64_t from, int64_t to) {
      const int64_t width = tensors[i].dtype == 0 ? 4 : 2;
      const char* values = static_cast<const char*>(tensors[i].values) + from * width;
      parts[size_t(chunk)] = squared_sum(values, tensors[i].dtype, to - from);
    });
  });
  double sum = 0;
  int64_t bad = -1;
  for (size_t i = 0; i < tensors.size(); ++i)
    for (int64_t chunk = chunks.first(i); chunk < chunks.first(i + 1); ++chunk) {
      sum += parts[size_t(chunk)];
      if (bad < 0 && !std::isfinite(parts[size_t(chunk)])) bad = int64_t(i);
    }
  return {sum, bad};
}
