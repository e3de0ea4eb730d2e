// Cuts a call into tasks and gives them to the threads.
#include "attention/attention_cpu.h"

#include <algorithm>
#include <vector>

#include "common/cpu.h"
#include "common/parallel.h"
#include "common/workspace.h"

namespace {

const AttentionKernels& kernels(int dtype) { return PICK_TABLE_WITH_AMX(attention)[dtype]; }

int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The sequences, and the rows that their packed keys take.
std::vector<AttentionSequence> sequences(const AttentionBatch& b, int64_t& packed_rows) {
  std::vector<AttentionSequence> all;
  packed_rows = 0;
  for (int64_t i = 0; i < b.batch; ++i) {
    AttentionSequence s{i, b.rows, b.cols, 0, 0, i * b.rows, i * b.cols, packed_rows};
    if (b.cu_seqlens_q) {
      s.first_row = s.output_row = b.cu_seqlens_q[i];
      s.first_col = s.output_col = b.cu_seqlens_k[i];
      s.rows = b.cu_seqlens_q[i + 1] - b.cu_seqlens_q[i];
      s.cols = b.cu_seqlens_k[i + 1] - b.cu_seqlens_k[i];
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
    const int64_t wanted = blocks_of(16, heads);
    const int64_t most = blocks_of(s.rows, kBackwardQueries) / 4;
    return std::max<int64_t>(1, std::min(wanted, most));
  };
  const auto sums_of = [&](const AttentionSequence& s) {  // dk or dv, in floats
    return blocks_of(s.cols, kKeyBlock) * kKeyBlock * columns;
  };
  struct Task {
    const AttentionSequence* sequence;
    AttentionShare share;
    int64_t sums;  // offset of its dk and dv, in floats; -1: a thread's memory, for the only task
  };
  std::vector<Task> tasks;
  int64_t sums = 0, most_sums = 0;
  for (const auto& s : all)
    for (int64_t head = 0; head < a.key_heads; ++head)
      for (int64_t i = 0, n = shares_of(s); i < n; ++i) {
        tasks.push_back({&s, {head, i, n, nullptr, nullptr}, n > 1 ? sums : -1});
        if (n > 1)
          sums += 2 * sums_of(s);
        else
          most_sums = std::max(most_sums, 2 * sums_of(s));
      }

  const size_t kernel_bytes = Workspace::padded(sizes.backward_bytes);
  const size_t thread_bytes = kernel_bytes + Workspace::padded(4 * most_sums);
  Workspace memory;
  const auto keys = memory.plan(4 * rows * sizes.row_words);
  const auto values = memory.plan(4 * rows * sizes.row_words);
  const auto turned = memory.plan(4 * rows / kKeyBlock * sizes.turned_words);
  const auto shared_sums = memory.plan(4 * sums);
  const auto scratch = memory.plan(int64_t(size_t(threads) * thread_bytes));
  memory.take();
  a.packed_keys = memory[keys];
  a.packed_values = memory[values];
  a.packed_keys_turned = memory[turned];

  const auto blocks = key_blocks(all, a.key_heads);
  parallel_tasks(threads, int64_t(blocks.size()), [&](int64_t i, int) {
    const Block& b = blocks[size_t(i)];
    table.pack(a, all[size_t(b.sequence)], b.head, b.block, true);
  });
  // The longest first, so that the threads end together.
  std::vector<size_t> order(tasks.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  const auto cost = [&](size_t i) {
    return tasks[i].sequence->rows * tasks[i].sequence->cols / tasks[i].share.step;
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t i, size_t j) { return cost(i) > cost(j); });
  parallel_tasks(threads, int64_t(tasks.size()), [&](int64_t i, int thread) {
    Task& task = tasks[order[size_t(i)]];
    const AttentionSequence& s = *task.sequence;
    char* const mine = memory[scratch] + size_t(thread) * thread_bytes;
    task.share.dk = task.sums < 0 ? reinterpret_cast<float*>(mine + kernel_bytes)
                                  : reinterpret_cast<float*>(memory[shared_sums]) + task.sums;
    task.share.dv = task.share.dk + sums_of(s);
    table.backward(a, s, task.share, mine);
    if (task.sums < 0)
      for (int64_t block = 0; block < blocks_of(s.cols, kKeyBlock); ++block)
        table.finish(a, s, &task.share, 1, block);
  });

  // The shares of a head stand one after the other.
  std::vector<AttentionShare> shares;
  for (const auto& task : tasks) shares.push_back(task.share);
  struct Sum {
    size_t task;
    int64_t block;
  };
  std::vector<Sum> open;
  for (size_t i = 0; i < tasks.size(); ++i)
    if (tasks[i].sums >= 0 && tasks[i].share.first == 0)
      for (int64_t block = 0; block < blocks_of(tasks[i].sequence->cols, kKeyBlock); ++block)
        open.push_back({i, block});
  parallel_tasks(threads, int64_t(open.size()), [&](int64_t i, int) {
    const auto [task, block] = open[size_t(i)];
    table.finish(a, *tasks[task].sequence, &shares[task], shares[task].step, block);
  });
}
