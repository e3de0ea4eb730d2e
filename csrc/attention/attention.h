// Attention over blocks: what a call consists of, and the table of its kernels.
//
// Scores are computed transposed, S^T = K Q^T: a lane is a query. Maxima, sums, scales and masks of
// the softmax are then arithmetic between registers, and the products that follow, O^T = V^T P^T
// and dQ^T = K^T dS^T, take P^T and dS^T as they come. Only V and K need turning, once a call.
#pragma once

#include <stdint.h>

// A tensor (batch, row, head, size) whose last dimension is contiguous; strides in elements. Of
// packed sequences `batch` is 0, and a row counts from the first sequence's.
struct AttentionView {
  const void* data;
  int64_t batch, row, head;
};

// One sequence: where it begins in the views, in the contiguous outputs, and where its keys are
// packed (a multiple of kKeyBlock).
struct AttentionSequence {
  int64_t index, rows, cols, first_row, first_col, output_row, output_col, packed;
};

struct Attention {
  AttentionView q, k, v;
  int64_t heads, key_heads, size;
  int64_t statistics_batch, statistics_head;  // strides of lse, lse_remainder, delta, dlse
  float scale, softcap;                       // softcap 0: none
  int64_t left, right;                        // -1: unlimited
  const float* sink;                          // [heads] or null
  float keep_scale;                           // 1 / (1 - dropout_p), 0 without dropout
  uint32_t drop_below;
  uint64_t seed;

  void* out;  // contiguous, like dq, dk, dv
  float* lse;
  float* lse_remainder;  // what float32 loses of lse, or null

  AttentionView dout, o;
  const float* dlse;  // or null
  float* delta;
  void *dq, *dk, *dv;

  void* packed_keys;            // [key_heads][packed rows] of rows of words
  void* packed_values;          // forward: turned; backward: rows
  void* packed_keys_turned;     // backward
  int64_t packed_rows;          // of one key head
};

// One task of the backward: the query blocks first, first + step, ... of all query heads that share
// a key head. It sums dk and dv of all keys of the sequence into its own memory.
struct AttentionShare {
  int64_t key_head, first, step;
  float *dk, *dv;  // [keys rounded up to kKeyBlock][size rounded up to 16]
};

constexpr int64_t kKeyBlock = 64;
constexpr int64_t kForwardQueries = 64;
constexpr int64_t kBackwardQueries = 128;

struct AttentionSizes {
  int64_t row_words;      // of a packed row of keys, or of values in the backward
  int64_t turned_words;   // of a key block of turned values or keys
  int64_t forward_bytes;  // of a thread's scratch memory
  int64_t backward_bytes;
};

struct AttentionKernels {
  AttentionSizes (*sizes)(int64_t size);
  // Packs one block of keys and values of a key head, for the forward or the backward.
  void (*pack)(const Attention&, const AttentionSequence&, int64_t key_head, int64_t block,
               bool backward);
  void (*forward)(const Attention&, const AttentionSequence&, int64_t head, int64_t block,
                  void* scratch);
  void (*backward)(const Attention&, const AttentionSequence&, const AttentionShare&,
                   void* scratch);
  // dk and dv of one key block: the sum over `shares`, in their order.
  void (*finish)(const Attention&, const AttentionSequence&, const AttentionShare* shares,
                 int64_t count, int64_t block);
};

// By dtype code (common/dtype.h), per instruction set.
extern const AttentionKernels attention_portable[3], attention_avx2[3], attention_avx512[3],
    attention_avx512bf16[3], attention_amx[3];
