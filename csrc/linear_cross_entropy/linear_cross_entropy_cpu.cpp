// Cuts a call into chunks of tokens, and a chunk's work into tasks for the threads. What is summed
// in which order follows from the shapes and the chunk alone.
#include "linear_cross_entropy/linear_cross_entropy_cpu.h"

#include <algorithm>
#include <cmath>

#include "common/cpu.h"
#include "common/parallel.h"
#include "common/workspace.h"

namespace {

const LinearCrossEntropyTable& kernels() { return PICK_TABLE_WITH_AMX(linear_cross_entropy); }

int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Below this a thread costs more than it saves: some 10 microseconds of products.
constexpr int64_t kWorkPerThread = 1000000;

// Weights that are packed at a time: more of them would leave the cache.
constexpr int64_t kPackedBytes = 8 << 20;

// Of the workspace. Calls that need more take seconds, and the peak of a training step may be here.
constexpr size_t kKeptBytes = size_t(128) << 20;

// lse and loss of rows [begin, end), in double: their errors would be those of whole rows.
void statistics(const LinearCrossEntropy& a, const LinearCrossEntropyChunk& c, int64_t blocks,
                int64_t begin, int64_t end) {
  const double smoothing = a.label_smoothing;
  for (int64_t row = begin; row < end; ++row) {
    float top = c.top[row];
    for (int64_t block = 1; block < blocks; ++block)
      top = std::max(top, c.top[block * c.rows + row]);
    double sum = 0, total = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t at = block * c.rows + row;
      sum += c.sum[at] * std::exp(double(c.top[at]) - double(top));
      if (smoothing > 0) total += c.total[at];
    }
    const double lse = double(top) + std::log(sum);
    double loss = (1 - smoothing) * (lse - double(c.target_logit[row]));
    if (smoothing > 0) loss += smoothing * (lse - total / double(a.vocabulary));
    a.lse[c.first + row] = lse;
    a.loss[c.first + row] = loss + a.z_loss * lse * lse;
  }
}

}  // namespace

void linear_cross_entropy(const LinearCrossEntropy& a, int dtype, int threads) {
  const auto& table = kernels().dtypes[dtype];
  const bool gradients = a.dhidden || a.dweight || a.dbias;
  const int64_t chunk = std::min(a.chunk, a.rows);
  const int64_t blocks = blocks_of(a.vocabulary, kVocabularyBlock);
  const int64_t packed_parts = blocks_of(a.size, kPackedColumns);
  const auto sizes = table.sizes(chunk, a.size);
  const int64_t slots = std::clamp<int64_t>(kPackedBytes / sizes.weight_slot, 1, blocks);
  const int64_t work = chunk * a.vocabulary * a.size;
  threads = int(std::min<int64_t>(threads, work / kWorkPerThread + 1));

  Workspace memory(kKeptBytes);
  const size_t turned = Workspace::padded(std::max(sizes.turned_weight, sizes.turned_dlogits));
  const auto hidden_rows = memory.plan(sizes.hidden_rows);
  const auto hidden_paired = memory.plan(a.dweight ? sizes.hidden_paired : 0);
  // Without gradients, a thread's block of logits is done with when its sums are known.
  const auto logits = memory.plan((gradients ? blocks : threads) * sizes.logits_block);
  const auto sums = memory.plan(4 * (3 * blocks + 1) * chunk);
  const auto dlogits = memory.plan(gradients ? slots * sizes.dlogits_slot : 0);
  const auto weight_paired = memory.plan(a.dhidden ? slots * sizes.weight_slot : 0);
  const auto scratch = memory.plan(int64_t(size_t(threads) * turned));
  memory.take();

  for (int64_t first = 0; first < a.rows; first += chunk) {
    LinearCrossEntropyChunk c{};
    c.first = first;
    c.rows = std::min(chunk, a.rows - first);
    c.hidden_rows = memory[hidden_rows];
    c.hidden_paired = memory[hidden_paired];
    c.logits = reinterpret_cast<float*>(memory[logits]);
    c.top = reinterpret_cast<float*>(memory[sums]);
    c.sum = c.top + blocks * c.rows;
    c.total = c.sum + blocks * c.rows;
    c.target_logit = c.total + blocks * c.rows;
    c.dlogits = memory[dlogits];
    c.weight_paired = memory[weight_paired];
    const int64_t block_floats = table.sizes(c.rows, a.size).logits_block / 4;

    parallel_tasks(threads, a.dweight ? packed_parts : 1, [&](int64_t part, int) {
      table.pack_hidden(a, c, part * kPackedColumns, a.dweight != nullptr);
    });
    parallel_tasks(threads, blocks, [&](int64_t block, int thread) {
      table.logits(a, c, block, c.logits + (gradients ? block : thread) * block_floats,
                   memory[scratch] + size_t(thread) * turned);
    });
    if (a.loss)
      parallel_for(threads, c.rows, 8 * blocks * c.rows, [&](int64_t begin, int64_t end) {
        statistics(a, c, blocks, begin, end);
      });
    if (!gradients) continue;

    const int64_t token_blocks = blocks_of(c.rows, kTokenBlock);
    const auto end_of = [&](int64_t i) { return std::min((i + 1) * kTokenBlock, c.rows); };
    for (int64_t block = 0; block < blocks; block += slots) {
      const int64_t now = std::min(slots, blocks - block);
      const int64_t parts = token_blocks + (a.dhidden ? 1 : 0);  // of a slot: its weights last
      parallel_tasks(threads, now * parts, [&](int64_t task, int) {
        const int64_t slot = task / parts, i = task % parts;
        if (i == token_blocks)
          table.pack_weight(a, c, block + slot, slot);
        else
          table.dlogits(a, c, block + slot, slot, i * kTokenBlock, end_of(i));
      });
      // The long tasks first, so that the threads end together.
      const int64_t long_tasks = a.dhidden ? token_blocks : 0;
      const int64_t halves = kVocabularyBlock / kWeightBlock;
      const int64_t short_tasks = a.dweight || a.dbias ? now * halves : 0;
      parallel_tasks(threads, long_tasks + short_tasks, [&](int64_t task, int thread) {
        if (task < long_tasks) {
          table.dhidden(a, c, block == 0, now, task * kTokenBlock, end_of(task));
          return;
        }
        task -= long_tasks;
        table.dweight(a, c, block + task / halves, task / halves, task % halves,
                      memory[scratch] + size_t(thread) * turned);
      });
    }
  }
}

void scale_rows(const float* x, int64_t stride, int64_t rows, int64_t cols, float factor, void* y,
                int dtype, int threads) {
  const auto& table = kernels();
  parallel_for(threads, rows, 8 * rows * cols, [&](int64_t begin, int64_t end) {
    table.scale(x, stride, cols, factor, y, dtype, begin, end);
  });
}
