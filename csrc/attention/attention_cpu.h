#pragma once

#include "attention/attention.h"

// A batch of sequences of one length, or, with q_ends and k_ends [batch + 1], of packed sequences.
struct AttentionBatch {
  int64_t batch, rows, cols;
  const int32_t *q_ends, *k_ends;
};

// The views, options and outputs of `a` are set; the packed operands are this function's business.
void attention_forward(Attention a, const AttentionBatch& batch, int dtype, int threads);
void attention_backward(Attention a, const AttentionBatch& batch, int dtype, int threads);
