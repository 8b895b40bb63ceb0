#include <nanobind/nanobind.h>

#include "bindings/module.h"
#include "bindings/step_batch.h"
#include "core/contract.h"
#include "cpu/cpu.h"

namespace tml {
namespace {

constexpr const char* kOp = "attn_prologue";

void attn_prologue(nb::handle qkvr_h, nb::handle k_conv_h, nb::handle v_conv_h, nb::handle q_norm_h,
                   nb::handle k_norm_h, float eps, float log_floor, float log_alpha,
                   nb::handle pages_h, std::int64_t layer, nb::handle table_h,
                   nb::handle conv_rows_h, std::int64_t conv_layer, std::int64_t k_channel,
                   std::int64_t v_channel, nb::handle cu_tokens, nb::handle slots,
                   nb::handle start_pos, nb::handle q_h, nb::handle r_h, int num_threads) {
  const Tensor qkvr(qkvr_h, kOp, "qkvr");
  const Tensor k_conv(k_conv_h, kOp, "k_conv"), v_conv(v_conv_h, kOp, "v_conv");
  const Tensor q_norm(q_norm_h, kOp, "q_norm"), k_norm(k_norm_h, kOp, "k_norm");
  const Tensor pages(pages_h, kOp, "pages"), table(table_h, kOp, "table");
  const Tensor conv_rows(conv_rows_h, kOp, "conv_rows");
  const Tensor q(q_h, kOp, "q_out"), r(r_h, kOp, "r_out");
  qkvr.floating().rank(2).rows_contiguous();
  const DType dtype = qkvr.type();
  AttnPrologueParams params{};
  params.pages = pages_arg(kOp, pages, layer, table, dtype);
  const std::int64_t dim = params.pages.head_dim;
  if (dim % contract::kLanes != 0)
    pages.refuse("of a head_dim that is a multiple of 16", "head_dim " + std::to_string(dim));
  const std::int64_t channels = params.pages.num_kv_heads * dim;
  q.dtype(dtype).shape({qkvr.size(0), kAny, dim}).contiguous();
  r.dtype(dtype).shape({qkvr.size(0), q.size(1), kAny}).contiguous();
  qkvr.shape({kAny, q.size(1) * (dim + r.size(2)) + 2 * channels});
  k_conv.dtype(DType::kF32).shape({channels, contract::kConvTaps}).contiguous();
  v_conv.dtype(DType::kF32).shape({channels, contract::kConvTaps}).contiguous();
  q_norm.dtype(dtype).shape({dim}).contiguous();
  k_norm.dtype(dtype).shape({dim}).contiguous();
  if (!(log_floor >= 0.0f))
    throw ArgumentError("attn_prologue: log_floor must be >= 0 (0: no log scaling), got " +
                        std::to_string(log_floor));
  const std::int64_t num_slots = table.size(0);
  if (start_pos.is_none())
    throw ArgumentError("attn_prologue: start_pos must be a tensor, got None");
  params.batch = batch_arg(kOp, cu_tokens, slots, start_pos, nb::none(), qkvr.size(0), num_slots);
  check_written_pages(kOp, params.batch, params.pages, pages.size(0));
  params.k_rows = conv_arg(kOp, conv_rows, conv_layer, k_channel, channels, num_slots, dtype);
  params.v_rows = conv_arg(kOp, conv_rows, conv_layer, v_channel, channels, num_slots, dtype);
  if (k_channel < v_channel + channels && v_channel < k_channel + channels)
    throw ArgumentError("attn_prologue: k_channel and v_channel must be at least " +
                        std::to_string(channels) + " apart, got " + std::to_string(k_channel) +
                        " and " + std::to_string(v_channel));
  params.qkvr = qkvr.data();
  params.k_conv = k_conv.data<const float>();
  params.v_conv = v_conv.data<const float>();
  params.q_norm = q_norm.data();
  params.k_norm = k_norm.data();
  params.q = q.data();
  params.r = r.data();
  params.qkvr_row_stride = qkvr.stride(0);
  params.num_heads = q.size(1);
  params.d_rel = r.size(2);
  params.eps = eps;
  params.log_floor = log_floor;
  params.log_alpha = log_alpha;
  params.dtype = dtype;
  params.num_threads = num_threads;
  nb::gil_scoped_release release;
  cpu::attn_prologue(params);
}

}  // namespace

void bind_attn_prologue(nb::module_& m) {
  m.def("attn_prologue", &attn_prologue, nb::arg("qkvr"), nb::arg("k_conv"), nb::arg("v_conv"),
        nb::arg("q_norm"), nb::arg("k_norm"), nb::arg("eps"), nb::arg("log_floor"),
        nb::arg("log_alpha"), nb::arg("pages"), nb::arg("layer"), nb::arg("table"),
        nb::arg("conv_rows"), nb::arg("conv_layer"), nb::arg("k_channel"), nb::arg("v_channel"),
        nb::arg("cu_tokens"), nb::arg("slots"), nb::arg("start_pos").none(), nb::arg("q_out"),
        nb::arg("r_out"), nb::arg("num_threads"));
}

}  // namespace tml
