#include "adamw/adamw_cpu.h"

#include <algorithm>

#include "common/cpu.h"
#include "common/parallel.h"

namespace {

const AdamWKernels& kernels() {
#if defined(__x86_64__)
  return pick(adamw_portable, adamw_avx2, adamw_avx512, adamw_avx512bf16);
#else
  return adamw_portable;
#endif
}

// Threads get whole chunks, so that no two of them write to one cache line.
constexpr int64_t kChunk = 1024;
constexpr int64_t kBytesPerElement = 28;  // fp32: four arrays read, three written

}  // namespace

void adamw_step(const std::vector<AdamWTensor>& tensors, const AdamWScalars& scalars,
                int threads) {
  // All tensors laid end to end, in chunks: one parallel region, whose threads get equal shares
  // whether the model is one flat buffer or thousands of small tensors.
  std::vector<int64_t> first(tensors.size() + 1, 0);
  for (size_t i = 0; i < tensors.size(); ++i)
    first[i + 1] = first[i] + (tensors[i].numel + kChunk - 1) / kChunk;
  const int64_t chunks = first.back();
  const auto& table = kernels();
  parallel_for(threads, chunks, chunks * kChunk * kBytesPerElement,
               [&](int64_t begin, int64_t end) {
                 size_t i = size_t(std::upper_bound(first.begin(), first.end(), begin) -
                                   first.begin() - 1);
                 for (; i < tensors.size() && first[i] < end; ++i) {
                   const int64_t from = std::max<int64_t>(begin - first[i], 0) * kChunk;
                   const int64_t to = std::min((end - first[i]) * kChunk, tensors[i].numel);
                   if (from < to) table.step(tensors[i], scalars, from, to);
                 }
               });
}
