// Cross-entropy of a linear layer, chunk of tokens by chunk, without all the logits at once.
//
//   z = softcap(hidden weight^T + bias),  lse = log sum exp z,
//   loss = (1 - s) (lse - z[target]) + s (lse - mean z) + z_loss lse^2
//
// A chunk's logits, in float32, are cut into blocks of kVocabularyBlock columns, each of which is
// computed as one task: logits [blocks][padded rows][kVocabularyBlock]. Their gradients are made
// for a few blocks at a time ("slots"), in the dtype of the products, and used twice while they are
// in the cache: for dhidden and for dweight.
#pragma once

#include <stdint.h>

struct LinearCrossEntropy {
  const void* hidden;     // [rows, size], row stride hidden_stride (elements)
  const void* weight;     // [vocabulary, size], row stride weight_stride
  const void* bias;       // [vocabulary] or null
  const int64_t* target;  // [rows], each in [0, vocabulary)
  int64_t hidden_stride, weight_stride, rows, vocabulary, size, chunk;
  double label_smoothing, z_loss;
  float softcap;          // 0: none
  double* loss;           // [rows]; null: lse is known already, and only gradients are wanted
  double* lse;            // [rows]
  const float* upstream;  // [rows]: the factor of each token's gradients; null: 1
  // Gradients, each of them or null. A row of dhidden and dweight is size rounded up to 16 floats,
  // and there is memory for 15 rows more.
  float *dhidden, *dweight, *dbias;
};

// The chunk that is being worked on, and its memory.
struct LinearCrossEntropyChunk {
  int64_t first, rows;
  void* hidden_rows;    // [padded rows][words]
  void* hidden_paired;  // [panels][row words][columns of a panel]
  float* logits;
  float *top, *sum, *total;  // [blocks][rows]: maximum, sum of exp(z - maximum), sum of z
  float* target_logit;       // [rows]
  void* dlogits;             // [slots][padded rows][kVocabularyBlock]
  void* weight_paired;       // [slots][panels][kVocabularyBlock / kPair words][of a panel]
};

constexpr int64_t kVocabularyBlock = 256;
constexpr int64_t kPackedColumns = 64;  // of an operand that are packed at a time
constexpr int64_t kTokenBlock = 96;     // rows of a product whose operands stay in the cache
constexpr int64_t kWeightBlock = 128;   // rows of dweight in one task

// Bytes of a chunk's parts.
struct LinearCrossEntropySizes {
  int64_t hidden_rows, hidden_paired, logits_block, dlogits_slot, weight_slot;
  int64_t turned_weight, turned_dlogits;  // of a thread
};

struct LinearCrossEntropyKernels {
  LinearCrossEntropySizes (*sizes)(int64_t rows, int64_t size);
  // Columns of the chunk's hidden states from `column`, a multiple of kPackedColumns, on: paired,
  // and of column 0 also all of them by rows.
  void (*pack_hidden)(const LinearCrossEntropy&, const LinearCrossEntropyChunk&, int64_t column,
                      bool paired);
  // A block of logits into `logits`, and with a.loss its top, sum, total and targets.
  void (*logits)(const LinearCrossEntropy&, const LinearCrossEntropyChunk&, int64_t block,
                 float* logits, void* turned_weight);
  void (*pack_weight)(const LinearCrossEntropy&, const LinearCrossEntropyChunk&, int64_t block,
                      int64_t slot);
  void (*dlogits)(const LinearCrossEntropy&, const LinearCrossEntropyChunk&, int64_t block,
                  int64_t slot, int64_t begin, int64_t end);
  // kWeightBlock rows of dweight and dbias, from `part` of a block.
  void (*dweight)(const LinearCrossEntropy&, const LinearCrossEntropyChunk&, int64_t block,
                  int64_t slot, int64_t part, void* turned_dlogits);
  // Rows [begin, end) of dhidden from the first `slots` slots; `first`: they are the first ones.
  void (*dhidden)(const LinearCrossEntropy&, const LinearCrossEntropyChunk&, bool first,
                  int64_t slots, int64_t begin, int64_t end);
};

// Rows [begin, end) of y [., cols], dtype y, = factor * x, whose rows are `stride` floats apart.
using ScaleRows = void (*)(const float* x, int64_t stride, int64_t cols, float factor, void* y,
                           int dtype, int64_t begin, int64_t end);

struct LinearCrossEntropyTable {
  LinearCrossEntropyKernels dtypes[3];  // by the codes of common/dtype.h
  ScaleRows scale;
};

extern const LinearCrossEntropyTable linear_cross_entropy_portable, linear_cross_entropy_avx2,
    linear_cross_entropy_avx512, linear_cross_entropy_avx512bf16, linear_cross_entropy_amx;
