#pragma once

#include "attention/attention.h"

// A batch of sequences of one length, or, with cu_seqlens [batch + 1], of packed sequences.
struct AttentionBatch {
  int64_t batch, rows, cols;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;
};

// The views, options and outputs of `a` are set; the packed operands are this function's business.
void attention_forward(Attention a, const AttentionBatch& batch, int dtype, int threads);
void attention_backward(Attention a, const AttentionBatch& batch, int dtype, int threads);
