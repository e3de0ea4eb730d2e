// Cuts a call into tasks and gives them to the threads.
#include "attention/attention_cpu.h"

#include <algorithm>
#include <vector>

#include "common/cpu.h"
#include "common/parallel.h"
#include "common/workspace.h"

namespace {

const AttentionKernels& kernels(int dtype) {
#if defined(__x86_64__)
  return pick(attention_portable, attention_avx2, attention_avx512, attention_avx512bf16,
              attention_amx)[dtype];
#else
  return attention_portable[dtype];
#endif
}

int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The sequences, and the rows that their packed keys take.
std::vector<AttentionSequence> sequences(const AttentionBatch& b, int64_t& packed_rows) {
  std::vector<AttentionSequence> all;
  packed_rows = 0;
  for (int64_t i = 0; i < b.batch; ++i) {
    AttentionSequence s{i, b.rows, b.cols, 0, 0, i * b.rows, i * b.cols, packed_rows};
    if (b.q_ends) {
      s.first_row = s.output_row = b.q_ends[i];
      s.first_col = s.output_col = b.k_ends[i];
      s.rows = b.q_ends[i + 1] - b.q_ends[i];
      s.cols = b.k_ends[i + 1] - b.k_ends[i];
    }
    packed_rows += blocks_of(s.cols, kKeyBlock) * kKeyBlock;
    all.push_back(s);
  }
  return all;
}

struct Block {
  int32_t sequence, head, block;
};

// Every key block of every key head.
std::vector<Block> key_blocks(const std::vector<AttentionSequence>& all, int64_t key_heads) {
  std::vector<Block> blocks;
  for (const auto& s : all)
    for (int64_t head = 0; head < key_heads; ++head)
      for (int64_t i = 0; i < blocks_of(s.cols, kKeyBlock); ++i)
        blocks.push_back({int32_t(s.index), int32_t(head), int32_t(i)});
  return blocks;
}

// Multiply-adds of the whole call, at most: what decides whether threads are worth waking.
int64_t work_of(const Attention& a, const std::vector<AttentionSequence>& all) {
  int64_t work = 0;
  for (const auto& s : all) work += s.rows * s.cols * a.heads * a.size;
  return work;
}

// Below this a thread costs more than it saves: some 10 microseconds of products.
constexpr int64_t kWorkPerThread = 1000000;

int useful_threads(int threads, int64_t work) {
  return int(std::min<int64_t>(threads, work / kWorkPerThread + 1));
}

}  // namespace

void attention_forward(Attention a, const AttentionBatch& batch, int dtype, int threads) {
  const auto& table = kernels(dtype);
  const AttentionSizes sizes = table.sizes(a.size);
  const auto all = sequences(batch, a.packed_rows);
  threads = useful_threads(threads, work_of(a, all));
  const int64_t rows = a.key_heads * a.packed_rows;
  Workspace memory;
  const auto keys = memory.plan(4 * rows * sizes.row_words);
  const auto values = memory.plan(4 * rows / kKeyBlock * sizes.turned_words);
  const auto scratch = memory.plan(threads * Workspace::padded(sizes.forward_bytes));
  memory.take();
  a.packed_keys = memory[keys];
  a.packed_values = memory[values];

  const auto blocks = key_blocks(all, a.key_heads);
  parallel_tasks(threads, int64_t(blocks.size()), [&](int64_t i, int) {
    const Block& b = blocks[size_t(i)];
    table.pack(a, all[size_t(b.sequence)], b.head, b.block, false);
  });
  // A head's blocks from the last one on: with a causal mask the longest first, so that the threads
  // end together.
  std::vector<Block> tasks;
  for (const auto& s : all)
    for (int64_t head = 0; head < a.heads; ++head)
      for (int64_t i = blocks_of(s.rows, kForwardQueries); i-- > 0;)
        tasks.push_back({int32_t(s.index), int32_t(head), int32_t(i)});
  parallel_tasks(threads, int64_t(tasks.size()), [&](int64_t i, int thread) {
    const Block& t = tasks[size_t(i)];
    table.forward(a, all[size_t(t.sequence)], t.head, t.block,
                  memory[scratch] + thread * Workspace::padded(sizes.forward_bytes));
  });
}

void attention_backward(Attention a, const AttentionBatch& batch, int dtype, int threads) {
  const auto& table = kernels(dtype);
  const AttentionSizes sizes = table.sizes(a.size);
  const auto all = sequences(batch, a.packed_rows);
  threads = useful_threads(threads, 2 * work_of(a, all));
  const int64_t rows = a.key_heads * a.packed_rows, columns = (a.size + 15) / 16 * 16;

  // A key head is one task, or several where there are few: each with sums of its own, which are
  // added in the end. How many follows from the shapes alone, and so do the bits. Four blocks of
  // queries a share at least, or the adding would cost more than a few per cent.
  const int64_t heads = int64_t(all.size()) * a.key_heads;
  const auto shares_of = [&](const AttentionSequence& s) {
    const int64_t wanted = heads ? blocks_of(16, heads) : 1;
    const int64_t most = blocks_of(s.rows, kBackwardQueries) / 4;
    return std::max<int64_t>(1, std::min(wanted, most));
  };
  struct Task {
    int32_t sequence;
    int64_t sums;  // offset of dk, dv, in floats
    AttentionShare share;
  };
  std::vector<Task> tasks;
  int64_t sums = 0;
  for (const auto& s : all)
    for (int64_t head = 0; head < a.key_heads; ++head)
      for (int64_t i = 0, n = shares_of(s); i < n; ++i) {
        tasks.push_back({int32_t(s.index), sums, {head, i, n, nullptr, nullptr}});
        sums += 2 * blocks_of(s.cols, kKeyBlock) * kKeyBlock * columns;
      }

  Workspace memory;
  const auto keys = memory.plan(4 * rows * sizes.row_words);
  const auto values = memory.plan(4 * rows * sizes.row_words);
  const auto turned = memory.plan(4 * rows / kKeyBlock * sizes.turned_words);
  const auto sums_at = memory.plan(4 * sums);
  const auto scratch = memory.plan(threads * Workspace::padded(sizes.backward_bytes));
  memory.take();
  a.packed_keys = memory[keys];
  a.packed_values = memory[values];
  a.packed_keys_turned = memory[turned];
  for (auto& task : tasks) {
    const auto& s = all[size_t(task.sequence)];
    task.share.dk = reinterpret_cast<float*>(memory[sums_at]) + task.sums;
    task.share.dv = task.share.dk + blocks_of(s.cols, kKeyBlock) * kKeyBlock * columns;
  }

  const auto blocks = key_blocks(all, a.key_heads);
  parallel_tasks(threads, int64_t(blocks.size()), [&](int64_t i, int) {
    const Block& b = blocks[size_t(i)];
    table.pack(a, all[size_t(b.sequence)], b.head, b.block, true);
  });
  // The longest first, so that the threads end together.
  std::vector<int32_t> order(tasks.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = int32_t(i);
  const auto cost = [&](int32_t i) {
    const auto& s = all[size_t(tasks[size_t(i)].sequence)];
    return s.rows * s.cols / tasks[size_t(i)].share.step;
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t i, int32_t j) { return cost(i) > cost(j); });
  parallel_tasks(threads, int64_t(tasks.size()), [&](int64_t i, int thread) {
    const Task& t = tasks[size_t(order[size_t(i)])];
    table.backward(a, all[size_t(t.sequence)], t.share,
                   memory[scratch] + thread * Workspace::padded(sizes.backward_bytes));
  });
  // The shares of a head stand one after the other, heads as in key_blocks.
  std::vector<AttentionShare> shares;
  std::vector<size_t> first_share;
  for (const auto& task : tasks) {
    if (task.share.first == 0) first_share.push_back(shares.size());
    shares.push_back(task.share);
  }
  parallel_tasks(threads, int64_t(blocks.size()), [&](int64_t i, int) {
    const Block& b = blocks[size_t(i)];
    const AttentionShare* const share =
        &shares[first_share[size_t(b.sequence * a.key_heads + b.head)]];
    table.finish(a, all[size_t(b.sequence)], share, share->step, b.block);
  });
}
