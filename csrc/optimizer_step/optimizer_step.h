// One optimizer step over many tensors in one sweep: each element's weight, gradient and states are
// read once, updated, and written once; the gradient is zeroed while its line is in the cache.
// The rules' formulas: gradsmith_kernels/ops/optimizer_step/rules.py, which also computes `c`.
#pragma once

#include <stdint.h>

// In the order of gradsmith_kernels/ops/optimizer_step/rules.py.
enum Rule : int {
  kAdam = 0,
  kLion = 1,
  kSgd = 2,
  kMomentum = 3,
  kAdagrad = 4,
  kScheduleFree = 5,
  kLambNorms = 6,  // moments, and the sums that the trust ratio is made of
  kLambApply = 7,
  kDirection = 8,
  kAmsgrad = 9,
  kRules = 10
};

constexpr int kUInt8 = 3;           // a state's dtype beside those of common/dtype.h
constexpr int64_t kStateBlock = 256;  // elements that share a scale of an 8-bit state

struct StepTensor {
  void* param;             // dtype param_dtype; only written where there is a master
  void* grad;              // dtype grad_dtype
  void* state1;            // dtype state_dtype, or null
  void* state2;            // likewise
  void* state3;            // likewise; never of 8 bits
  float* absmax1;          // 8-bit states: a scale for each block
  float* absmax2;
  float* master;           // float32 weights behind a 16-bit param, or null
  uint16_t* compensation;  // bfloat16: what rounding took from a 16-bit param, or null
  int64_t numel;
  int param_dtype, grad_dtype, state_dtype;
  uint32_t key;  // of this tensor's random bits in this step
  float c[8];    // the rule's coefficients
};

struct StepOptions {
  float scale;      // of the gradient
  bool zero_grad;
  bool stochastic;  // rounding of states that are not float32
};

// Sums over a stretch, for kLambNorms.
struct StepSums {
  double weight, update;
};

struct StepKernels {
  // Elements [begin, end) of one tensor; begin is a multiple of kStateBlock.
  void (*step[kRules])(const StepTensor&, const StepOptions&, int64_t begin, int64_t end,
                       StepSums*);
  // The sum of squares of count elements at `from`, not finite only if one of them is not.
  double (*squared_sum)(const void* from, int dtype, int64_t count);
};

extern const StepKernels step_portable, step_avx2, step_avx512, step_avx512bf16;
