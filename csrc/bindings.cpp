// The native module: what Python may call. It knows nothing of torch: tensors come as addresses,
// sizes, strides in elements and dtype codes (common/dtype.h), checked by the Python caller.
// The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>

#include "attention/attention_cpu.h"
#include "augment/augment_bindings.h"
#include "common/column_sums.h"
#include "common/cpu.h"
#include "common/parallel.h"
#include "glu/glu_cpu.h"
#include "layer_norm/layer_norm_cpu.h"
#include "linear/linear_cpu.h"
#include "linear_cross_entropy/linear_cross_entropy_cpu.h"
#include "plan_bindings.h"
#include "rms_norm/rms_norm_cpu.h"
#include "rope/rope_cpu.h"

namespace py = pybind11;

namespace {

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (int level = 0; level <= int(best_isa()); ++level) names.push_back(kIsaNames[level]);
  return names;
}

// `emulated`: take AMX on a machine without it, whose instructions an emulator then catches.
void set_isa(const std::string& name, bool emulated) {
  if (emulated && name == kIsaNames[int(Isa::kAmx)] && best_isa() >= Isa::kAvx512Bf16)
    return set_current_isa(Isa::kAmx);
  for (int level = 0; level <= int(best_isa()); ++level)
    if (name == kIsaNames[level]) return set_current_isa(Isa(level));
  throw py::value_error("set_isa: this machine has no instruction set level '" + name + "'");
}

// A misspelt GRADSMITH_ISA would be a measurement of another machine than the one that was meant.
void refuse_unknown_isa() {
  const char* const name = std::getenv("GRADSMITH_ISA");
  if (!name) return;
  std::string known;
  for (const char* level : kIsaNames) {
    if (!std::strcmp(name, level)) return;
    known += std::string(known.empty() ? "" : ", ") + level;
  }
  throw py::import_error("GRADSMITH_ISA is '" + std::string(name) + "'; it may be one of " + known);
}

void rms_norm_forward_binding(uintptr_t x, int64_t x_stride, uintptr_t residual,
                              int64_t residual_stride, uintptr_t weight, uintptr_t y, uintptr_t h,
                              uintptr_t rstd, int64_t rows, int64_t cols, double eps, double offset,
                              int x_dtype, int weight_dtype, int threads) {
  const RmsNormForward a{pointer(x), pointer(residual),    pointer(weight), pointer(y),
                         pointer(h), pointer<float>(rstd), x_stride,        residual_stride,
                         cols,       eps,                  float(offset)};
  rms_norm_forward(a, rows, x_dtype, weight_dtype, threads);
}

void rms_norm_backward_binding(uintptr_t dy, int64_t dy_stride, uintptr_t dh, int64_t dh_stride,
                               uintptr_t h, int64_t h_stride, uintptr_t weight, uintptr_t rstd,
                               uintptr_t dx, uintptr_t partial, uintptr_t dweight, int64_t rows,
                               int64_t cols, double offset, int x_dtype, int weight_dtype,
                               int threads) {
  const RmsNormBackward a{pointer(dy),
                          pointer(dh),
                          pointer(h),
                          pointer(weight),
                          pointer<float>(rstd),
                          pointer(dx),
                          pointer<float>(partial),
                          pointer(dweight),
                          dy_stride,
                          dh_stride,
                          h_stride,
                          rows,
                          cols,
                          float(offset)};
  rms_norm_backward(a, x_dtype, weight_dtype, threads);
}

// a and b: address, row stride, whether it is turned. shape: rows, columns, depth.
void linear_product_binding(const std::tuple<uintptr_t, int64_t, bool>& a,
                            const std::tuple<uintptr_t, int64_t, bool>& b, uintptr_t bias,
                            uintptr_t c, const std::array<int64_t, 3>& shape, int dtype,
                            int threads) {
  const auto& [a_at, a_stride, a_turned] = a;
  const auto& [b_at, b_stride, b_turned] = b;
  const LinearProduct p{pointer(a_at), pointer(b_at), pointer(bias), pointer(c), a_stride,
                        b_stride,      shape[0],      shape[1],      shape[2],   a_turned,
                        b_turned};
  linear_product(p, dtype, threads);
}

// gate, up and dy: address and row stride. gradients: of gate and up, 0 for one that is not needed.
using Rows = std::pair<uintptr_t, int64_t>;

void glu_forward_binding(const Rows& gate, const Rows& up, uintptr_t y, int64_t rows, int64_t cols,
                         int activation, int dtype, int threads) {
  const GluForward a{pointer(gate.first), pointer(up.first), pointer(y), gate.second,
                     up.second,           rows,              cols};
  glu_forward(a, activation, dtype, threads);
}

void glu_backward_binding(const Rows& dy, const Rows& gate, const Rows& up,
                          const std::pair<uintptr_t, uintptr_t>& gradients, int64_t rows,
                          int64_t cols, int activation, int dtype, int threads) {
  const GluBackward a{pointer(dy.first),         pointer(gate.first),       pointer(up.first),
                      pointer(gradients.first),  pointer(gradients.second), dy.second,
                      gate.second,               up.second,                 rows,
                      cols};
  glu_backward(a, activation, dtype, threads);
}

void layer_norm_forward_binding(uintptr_t x, int64_t x_stride, uintptr_t residual,
                                int64_t residual_stride, uintptr_t weight, uintptr_t bias,
                                uintptr_t y, uintptr_t h, uintptr_t statistics, int64_t rows,
                                int64_t cols, double eps, int x_dtype, int weight_dtype,
                                int bias_dtype, int threads) {
  const LayerNormForward a{pointer(x),
                           pointer(residual),
                           pointer(weight),
                           pointer(bias),
                           pointer(y),
                           pointer(h),
                           pointer<float>(statistics),
                           x_stride,
                           residual_stride,
                           cols,
                           eps,
                           weight_dtype,
                           bias_dtype};
  layer_norm_forward(a, rows, x_dtype, threads);
}

void layer_norm_backward_binding(uintptr_t dy, int64_t dy_stride, uintptr_t dh, int64_t dh_stride,
                                 uintptr_t h, int64_t h_stride, uintptr_t weight,
                                 uintptr_t statistics, uintptr_t dx, uintptr_t partial_weight,
                                 uintptr_t partial_bias, uintptr_t dweight, uintptr_t dbias,
                                 int64_t rows, int64_t cols, int x_dtype, int weight_dtype,
                                 int bias_dtype, int threads) {
  const LayerNormBackward a{pointer(dy),
                            pointer(dh),
                            pointer(h),
                            pointer(weight),
                            pointer<float>(statistics),
                            pointer(dx),
                            pointer<float>(partial_weight),
                            pointer<float>(partial_bias),
                            pointer(dweight),
                            pointer(dbias),
                            dy_stride,
                            dh_stride,
                            h_stride,
                            rows,
                            cols,
                            weight_dtype,
                            bias_dtype};
  layer_norm_backward(a, x_dtype, threads);
}

// hidden and weight: address and row stride. shapes: rows, vocabulary, size, chunk. options: label
// smoothing, z_loss, softcap. statistics: loss, lse, upstream. gradients: of hidden, weight, bias.
void linear_cross_entropy_binding(const std::pair<uintptr_t, int64_t>& hidden,
                                  const std::pair<uintptr_t, int64_t>& weight, uintptr_t bias,
                                  uintptr_t target, const std::array<int64_t, 4>& shapes,
                                  const std::array<double, 3>& options,
                                  const std::array<uintptr_t, 3>& statistics,
                                  const std::array<uintptr_t, 3>& gradients, int dtype,
                                  int threads) {
  const LinearCrossEntropy a{pointer(hidden.first),
                             pointer(weight.first),
                             pointer(bias),
                             pointer<int64_t>(target),
                             hidden.second,
                             weight.second,
                             shapes[0],
                             shapes[1],
                             shapes[2],
                             shapes[3],
                             options[0],
                             options[1],
                             float(options[2]),
                             pointer<double>(statistics[0]),
                             pointer<double>(statistics[1]),
                             pointer<float>(statistics[2]),
                             pointer<float>(gradients[0]),
                             pointer<float>(gradients[1]),
                             pointer<float>(gradients[2])};
  linear_cross_entropy(a, dtype, threads);
}

void scale_rows_binding(uintptr_t x, int64_t stride, int64_t rows, int64_t cols, float factor,
                        uintptr_t y, int dtype, int threads) {
  scale_rows(pointer<float>(x), stride, rows, cols, factor, pointer(y), dtype, threads);
}

// Address, and strides of batch, row and head.
using View = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

AttentionView attention_view(const View& view) {
  const auto& [address, batch, row, head] = view;
  return {pointer(address), batch, row, head};
}

// What both passes take: the shapes (batch, rows, cols, heads, key heads, size), the options
// (scale, left, right, softcap, dropout_p, seed), the ends of packed sequences or 0, and the
// strides of lse.
using AttentionShapes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
using AttentionOptions = std::tuple<double, int64_t, int64_t, double, double, uint64_t>;
using Pair = std::pair<int64_t, int64_t>;

std::pair<Attention, AttentionBatch> attention_call(const View& q, const View& k, const View& v,
                                                    const AttentionShapes& shapes,
                                                    const AttentionOptions& options,
                                                    const std::pair<uintptr_t, uintptr_t>& ends,
                                                    const Pair& statistics) {
  Attention a{};
  AttentionBatch b{};
  double softcap, dropout, scale;
  std::tie(b.batch, b.rows, b.cols, a.heads, a.key_heads, a.size) = shapes;
  std::tie(scale, a.left, a.right, softcap, dropout, a.seed) = options;
  a.q = attention_view(q);
  a.k = attention_view(k);
  a.v = attention_view(v);
  a.scale = float(scale);
  a.softcap = float(softcap);
  if (dropout > 0) {
    a.keep_scale = float(1 / (1 - dropout));
    a.drop_below = uint32_t(dropout * 4294967296.0);
  }
  b.q_ends = pointer<int32_t>(ends.first);
  b.k_ends = pointer<int32_t>(ends.second);
  std::tie(a.statistics_batch, a.statistics_head) = statistics;
  return {a, b};
}

void attention_forward_binding(const View& q, const View& k, const View& v,
                               const AttentionShapes& shapes, const AttentionOptions& options,
                               const std::pair<uintptr_t, uintptr_t>& ends,
                               const Pair& statistics, uintptr_t sink, uintptr_t out,
                               uintptr_t lse, uintptr_t rest, int dtype, int threads) {
  auto [a, batch] = attention_call(q, k, v, shapes, options, ends, statistics);
  a.sink = pointer<float>(sink);
  a.out = pointer(out);
  a.lse = pointer<float>(lse);
  a.rest = pointer<float>(rest);
  attention_forward(a, batch, dtype, threads);
}

void attention_backward_binding(const View& q, const View& k, const View& v, const View& out,
                                const View& dout, const AttentionShapes& shapes,
                                const AttentionOptions& options,
                                const std::pair<uintptr_t, uintptr_t>& ends,
                                const Pair& statistics, uintptr_t lse, uintptr_t rest,
                                uintptr_t dlse, uintptr_t dq, uintptr_t dk, uintptr_t dv,
                                uintptr_t delta, int dtype, int threads) {
  auto [a, batch] = attention_call(q, k, v, shapes, options, ends, statistics);
  a.o = attention_view(out);
  a.dout = attention_view(dout);
  a.lse = pointer<float>(lse);
  a.rest = pointer<float>(rest);
  a.dlse = pointer<float>(dlse);
  a.dq = pointer(dq);
  a.dk = pointer(dk);
  a.dv = pointer(dv);
  a.delta = pointer<float>(delta);
  attention_backward(a, batch, dtype, threads);
}

// tensors, one or two: view, address of the result, heads. cos and sin: address, strides of batch
// and row. shapes: batch, length, size, rotated.
void rope_binding(const std::vector<std::tuple<View, uintptr_t, int64_t>>& tensors,
                  const std::tuple<uintptr_t, int64_t, int64_t>& cos,
                  const std::tuple<uintptr_t, int64_t, int64_t>& sin,
                  const std::array<int64_t, 4>& shapes, bool interleaved, bool transposed,
                  int dtype, int table_dtype, int threads) {
  Rope a{};
  for (const auto& [view, y, heads] : tensors) {
    const auto& [x, batch, row, head] = view;
    a.tensors[a.count++] = {pointer(x), batch, row, head, pointer(y), heads};
  }
  const auto table = [](const std::tuple<uintptr_t, int64_t, int64_t>& t) {
    return RopeTable{pointer(std::get<0>(t)), std::get<1>(t), std::get<2>(t)};
  };
  a.cos = table(cos);
  a.sin = table(sin);
  a.length = shapes[1];
  a.size = shapes[2];
  a.rotated = shapes[3];
  a.interleaved = interleaved;
  a.transposed = transposed;
  a.table_dtype = table_dtype;
  rope(a, shapes[0], dtype, threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.attr("__doc__") = "gradsmith's C++ kernels; called by the cpu backend of each op.";

  refuse_unknown_isa();
  m.def("isa_levels", isa_levels, "Instruction set levels that this machine runs, best last.");
  m.def("isa", [] { return std::string(kIsaNames[int(current_isa())]); }, "The level in use.");
  m.def("set_isa", set_isa, py::arg("name"), py::arg("emulated") = false,
        "Use another level (for tests).");
  m.def("parallel_runtime", parallel_runtime, "Where the threads come from.");

  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("rms_norm_forward", rms_norm_forward_binding, no_gil);
  m.def("rms_norm_backward", rms_norm_backward_binding, no_gil);
  m.def("glu_forward", glu_forward_binding, no_gil);
  m.def("glu_backward", glu_backward_binding, no_gil);
  m.def("layer_norm_forward", layer_norm_forward_binding, no_gil);
  m.def("layer_norm_backward", layer_norm_backward_binding, no_gil);
  m.def("block_count", block_count, "Blocks of rows in the partial sums of a norm's gradients.");
  m.def("attention_forward", attention_forward_binding, no_gil);
  m.def("attention_backward", attention_backward_binding, no_gil);
  m.def("linear_product", linear_product_binding, no_gil);
  m.def("linear_cross_entropy", linear_cross_entropy_binding, no_gil);
  m.def("rope", rope_binding, no_gil);
  m.def("scale_rows", scale_rows_binding, no_gil);

  bind_plans(m);
  bind_augment(m);
}
