#include <pybind11/stl.h>
#include <tuple>

#include "attention/attention_cpu.h"
#include "common/bindings.h"

namespace {

// Address, and strides of batch (0 for packed sequences), row and head.
using View = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

AttentionView attention_view(const View& view) {
  const auto& [address, batch, row, head] = view;
  return {pointer(address), batch, row, head};
}

// What both passes take. Of packed sequences, rows and cols are 0 and cu_seqlens are given.
Attention attention_of(const View& q, const View& k, const View& v, int64_t heads,
                       int64_t key_heads, int64_t size, double scale, int64_t left, int64_t right,
                       double softcap, double dropout_p, uint64_t seed, int64_t lse_batch,
                       int64_t lse_head) {
  Attention a{};
  a.q = attention_view(q);
  a.k = attention_view(k);
  a.v = attention_view(v);
  a.heads = heads;
  a.key_heads = key_heads;
  a.size = size;
  a.statistics_batch = lse_batch;
  a.statistics_head = lse_head;
  a.scale = float(scale);
  a.softcap = float(softcap);
  a.left = left;
  a.right = right;
  a.seed = seed;
  if (dropout_p > 0) {
    a.keep_scale = float(1 / (1 - dropout_p));
    a.drop_below = uint32_t(dropout_p * 4294967296.0);
  }
  return a;
}

void forward(const View& q, const View& k, const View& v, int64_t batch, int64_t rows,
             int64_t cols, int64_t heads, int64_t key_heads, int64_t size, double scale,
             int64_t left, int64_t right, double softcap, double dropout_p, uint64_t seed,
             uintptr_t cu_seqlens_q, uintptr_t cu_seqlens_k, int64_t lse_batch, int64_t lse_head,
             uintptr_t sink, uintptr_t out, uintptr_t lse, uintptr_t lse_remainder, int dtype,
             int threads) {
  Attention a = attention_of(q, k, v, heads, key_heads, size, scale, left, right, softcap,
                             dropout_p, seed, lse_batch, lse_head);
  a.sink = pointer<float>(sink);
  a.out = pointer(out);
  a.lse = pointer<float>(lse);
  a.lse_remainder = pointer<float>(lse_remainder);
  const AttentionBatch sequences{batch, rows, cols, pointer<int32_t>(cu_seqlens_q),
                                 pointer<int32_t>(cu_seqlens_k)};
  attention_forward(a, sequences, dtype, threads);
}

void backward(const View& q, const View& k, const View& v, const View& out, const View& dout,
              int64_t batch, int64_t rows, int64_t cols, int64_t heads, int64_t key_heads,
              int64_t size, double scale, int64_t left, int64_t right, double softcap,
              double dropout_p, uint64_t seed, uintptr_t cu_seqlens_q, uintptr_t cu_seqlens_k,
              int64_t lse_batch, int64_t lse_head, uintptr_t lse, uintptr_t lse_remainder,
              uintptr_t dlse, uintptr_t dq, uintptr_t dk, uintptr_t dv, uintptr_t delta, int dtype,
              int threads) {
  Attention a = attention_of(q, k, v, heads, key_heads, size, scale, left, right, softcap,
                             dropout_p, seed, lse_batch, lse_head);
  a.o = attention_view(out);
  a.dout = attention_view(dout);
  a.lse = pointer<float>(lse);
  a.lse_remainder = pointer<float>(lse_remainder);
  a.dlse = pointer<float>(dlse);
  a.dq = pointer(dq);
  a.dk = pointer(dk);
  a.dv = pointer(dv);
  a.delta = pointer<float>(delta);
  const AttentionBatch sequences{batch, rows, cols, pointer<int32_t>(cu_seqlens_q),
                                 pointer<int32_t>(cu_seqlens_k)};
  attention_backward(a, sequences, dtype, threads);
}

}  // namespace

BINDINGS(attention) {
  m.def("attention_forward", forward, NoGil());
  m.def("attention_backward", backward, NoGil());
}
