#include "bindings/decoder_step.h"

#include <nanobind/nanobind.h>

#include <algorithm>
#include <string>

#include "bindings/module.h"
#include "bindings/step_batch.h"
#include "bindings/tensor.h"
#include "core/contract.h"
#include "ops/session_attn.h"

namespace tml {
namespace {

constexpr const char* kOp = "decoder_step";

DecoderShape shape_of(std::int32_t hidden, std::int32_t window, std::int32_t d_rel, float eps,
                      float mup, float log_floor, float log_alpha, nb::handle final_norm) {
  const Tensor norm(final_norm, kOp, "final_norm");
  norm.floating().shape({hidden}).contiguous();
  // The convolutions' kernels take whole vectors.
  if (hidden % contract::kLanes != 0)
    throw ArgumentError("decoder_step: hidden must be a multiple of " +
                        std::to_string(contract::kLanes) + ", got " + std::to_string(hidden));
  return {hidden, window, d_rel, eps, mup, log_floor, log_alpha, norm.data(), norm.type()};
}

}  // namespace

PyDecoderStep::PyDecoderStep(std::int32_t hidden, std::int32_t window, std::int32_t d_rel,
                             float eps, float mup, float log_floor, float log_alpha,
                             nb::handle final_norm)
    : step_(shape_of(hidden, window, d_rel, eps, mup, log_floor, log_alpha, final_norm)) {
  keep(final_norm);
}

void PyDecoderStep::add_layer(bool is_sliding, std::int32_t num_heads, std::int32_t num_kv_heads,
                              std::int32_t head_dim, std::int32_t rel_len, std::int32_t num_experts,
                              std::int32_t num_shared, std::int32_t top_k, std::int32_t width,
                              float scale,
                              const nb::typed<nb::dict, nb::str, nb::object>& weights) {
  const DecoderShape& shape = step_.shape();
  const std::int64_t hidden = shape.hidden;
  const std::int64_t q_width = std::int64_t{num_heads} * head_dim;
  const std::int64_t kv_width = std::int64_t{num_kv_heads} * head_dim;
  const std::int64_t rel_width = std::int64_t{num_heads} * shape.d_rel;
  const std::int64_t experts = std::int64_t{num_experts} + num_shared;
  std::int32_t pool_layer = 0;
  for (const DecoderLayer& other : step_.layers()) {
    if (other.is_sliding != is_sliding) continue;
    ++pool_layer;
    if (other.num_kv_heads != num_kv_heads || other.head_dim != head_dim)
      throw ArgumentError("decoder_step: layers of one kind must share num_kv_heads and head_dim");
  }
  const auto plain = [&](const char* name, std::initializer_list<std::int64_t> dims) {
    return take(weights, name).dtype(shape.dtype).shape(dims).contiguous().data<const void>();
  };
  const auto single = [&](const char* name, std::initializer_list<std::int64_t> dims) {
    return take(weights, name).dtype(DType::kF32).shape(dims).contiguous().data<const float>();
  };
  const auto packed = [&](const char* name, std::int64_t count, std::int64_t panels,
                          std::int64_t in_dim, DType dtype) {
    const Tensor tensor = take(weights, name);
    tensor.dtype(dtype).contiguous().aligned(64);
    const std::int64_t steps = num_k_steps(dtype, in_dim);
    const std::int64_t pair = dtype == DType::kBf16 ? 2 : 1;
    const std::int64_t expected = count * panels * steps * contract::kPanel * pair;
    if (tensor.numel() != expected)
      tensor.refuse("packed to " + std::to_string(expected) + " elements",
                    std::to_string(tensor.numel()));
    return tensor.data<const void>();
  };
  const auto panels = [](std::int64_t outputs) { return ceil_div(outputs, contract::kPanel); };

  DecoderLayer layer{};
  layer.is_sliding = is_sliding;
  layer.pool_layer = pool_layer;
  layer.num_heads = num_heads;
  layer.num_kv_heads = num_kv_heads;
  layer.head_dim = head_dim;
  layer.rel_len = rel_len;
  layer.attn_norm = plain("attn_norm", {hidden});
  layer.qkvr = packed("qkvr", 1, panels(q_width + 2 * kv_width + rel_width), hidden, shape.dtype);
  layer.o = packed("o", 1, panels(hidden), q_width, shape.dtype);
  layer.k_conv = single("k_conv", {kv_width, contract::kConvTaps});
  layer.v_conv = single("v_conv", {kv_width, contract::kConvTaps});
  layer.q_norm = plain("q_norm", {head_dim});
  layer.k_norm = plain("k_norm", {head_dim});
  const Tensor bank = take(weights, "rel_bank");
  bank.dtype(shape.dtype).contiguous();
  const std::int64_t bank_size = num_k_steps(shape.dtype, shape.d_rel) * (rel_len + 2 * kRelPad) *
                                 (shape.dtype == DType::kBf16 ? 2 : 1);
  if (bank.numel() != bank_size)
    bank.refuse("packed to " + std::to_string(bank_size) + " elements",
                std::to_string(bank.numel()));
  layer.rel_bank = bank.data();
  layer.attn_sconv = single("attn_sconv", {hidden, contract::kConvTaps});
  layer.mlp_norm = plain("mlp_norm", {hidden});
  layer.mlp_sconv = single("mlp_sconv", {hidden, contract::kConvTaps});
  layer.num_experts = num_experts;
  layer.num_shared = num_shared;
  layer.top_k = top_k;
  layer.width = width;
  layer.w13 = packed("w13", experts, ceil_div(width, 16), hidden, shape.dtype);
  layer.w2 = packed("w2", experts, panels(hidden), width, shape.dtype);
  if (weights.contains("router")) {
    layer.router = packed("router", 1, panels(experts), hidden, DType::kF32);
    layer.router_bias = single("router_bias", {num_experts});
  } else if (num_experts != 1 || num_shared != 0 || top_k != 1) {
    throw ArgumentError("decoder_step: a layer without a router is one dense expert");
  }
  layer.scale = scale;
  step_.add_layer(layer);
}

void PyDecoderStep::run(nb::handle x_h, nb::handle out_h, nb::handle cu_tokens, nb::handle slots,
                        nb::handle start_pos, nb::handle visible_end, nb::handle global_pages,
                        nb::handle sliding_pages, nb::handle global_table, nb::handle sliding_table,
                        nb::handle conv_rows, int num_threads) const {
  const PyKvStore kv{{global_pages, sliding_pages}, {global_table, sliding_table}, conv_rows};
  const DecoderShape& shape = step_.shape();
  const Tensor x(x_h, kOp, "x"), out(out_h, kOp, "out");
  x.dtype(shape.dtype).shape({kAny, shape.hidden}).contiguous();
  const std::int64_t num_tokens = x.size(0);
  out.dtype(shape.dtype).shape({num_tokens, shape.hidden}).contiguous();
  const StepBatch batch =
      batch_arg(kOp, cu_tokens, slots, start_pos, visible_end, num_tokens, num_slots(kOp, kv));
  const DecoderState found = state(kOp, kv, batch);
  nb::gil_scoped_release release;
  step_.run(x.data(), out.data(), batch, found, num_threads);
}

std::int64_t PyDecoderStep::kv_width() const {
  std::int64_t width = 0;
  for (const DecoderLayer& layer : step_.layers())
    width = std::max<std::int64_t>(width, layer.num_kv_heads * layer.head_dim);
  return width;
}

std::int64_t PyDecoderStep::num_slots(const char* op, const PyKvStore& kv) const {
  if (step_.layers().empty()) throw ArgumentError(std::string(op) + ": no layers were added");
  const DecoderShape& shape = step_.shape();
  const Tensor conv_rows(kv.conv_rows, op, "conv_rows");
  conv_rows.dtype(shape.dtype)
      .shape({kAny, static_cast<std::int64_t>(step_.layers().size()), contract::kConvTaps - 1,
              2 * kv_width() + 2 * shape.hidden})
      .contiguous();
  return conv_rows.size(0);
}

DecoderState PyDecoderStep::state(const char* op, const PyKvStore& kv,
                                  const StepBatch& batch) const {
  const std::int64_t slots = num_slots(op, kv);
  const Tensor conv_rows(kv.conv_rows, op, "conv_rows");
  DecoderState state{};
  state.conv_rows = conv_rows.data();
  state.conv_slot_stride = conv_rows.stride(0);
  state.conv_layer_stride = conv_rows.stride(1);
  state.conv_row_stride = conv_rows.stride(2);
  state.kv_width = kv_width();
  for (int kind = 0; kind < 2; ++kind) {
    const Tensor pages(kv.pages[kind], op, kind == 0 ? "global_pages" : "sliding_pages");
    const Tensor table(kv.table[kind], op, kind == 0 ? "global_table" : "sliding_table");
    std::int64_t count = 0, kv_heads = 0, head_dim = 0;
    for (const DecoderLayer& layer : step_.layers()) {
      if (layer.is_sliding != (kind == 1)) continue;
      ++count;
      kv_heads = layer.num_kv_heads;
      head_dim = layer.head_dim;
    }
    if (count == 0) continue;
    pages.shape({kAny, count, kv_heads, 2, contract::kPageLen * head_dim});
    table.dtype(DType::kI32).shape({slots, kAny}).contiguous();
    check_written_pages(op, batch, pages_arg(op, pages, 0, table, step_.shape().dtype),
                        pages.size(0));
    state.pages[kind] = pages.data();
    state.page_stride[kind] = pages.stride(0);
    state.table[kind] = table.data<const std::int32_t>();
    state.table_row_stride[kind] = table.stride(0);
  }
  return state;
}

Tensor PyDecoderStep::take(const nb::dict& weights, const char* name) {
  if (!weights.contains(name))
    throw ArgumentError(std::string("decoder_step: weights must hold '") + name + "'");
  const nb::object tensor = weights[name];
  keep(tensor);
  return Tensor(tensor, kOp, name);
}

void bind_decoder_step(nb::module_& m) {
  nb::class_<PyDecoderStep>(m, "DecoderStep",
                            "Every layer of the decoder over one ragged step, in one call.")
      .def(nb::init<std::int32_t, std::int32_t, std::int32_t, float, float, float, float,
                    nb::handle>(),
           nb::arg("hidden"), nb::arg("window"), nb::arg("d_rel"), nb::arg("eps"), nb::arg("mup"),
           nb::arg("log_floor"), nb::arg("log_alpha"), nb::arg("final_norm"))
      .def("add_layer", &PyDecoderStep::add_layer, nb::kw_only(), nb::arg("is_sliding"),
           nb::arg("num_heads"), nb::arg("num_kv_heads"), nb::arg("head_dim"), nb::arg("rel_len"),
           nb::arg("num_experts"), nb::arg("num_shared"), nb::arg("top_k"), nb::arg("width"),
           nb::arg("scale"), nb::arg("weights"))
      .def("run", &PyDecoderStep::run, nb::arg("x"), nb::arg("out"), nb::arg("cu_tokens"),
           nb::arg("slots"), nb::arg("start_pos"), nb::arg("visible_end"), nb::arg("global_pages"),
           nb::arg("sliding_pages"), nb::arg("global_table"), nb::arg("sliding_table"),
           nb::arg("conv_rows"), nb::arg("num_threads"));
}

}  // namespace tml
