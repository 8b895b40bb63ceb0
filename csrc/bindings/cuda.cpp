// The device ops: the same checks of dtype, shape and layout as on the CPU, minus what only the
// values could tell (ids, tables, batches): those lie on the device, and reading them would wait
// for it. Whoever builds a batch checks it on the host. In a build without CUDA every op refuses.
#include <nanobind/nanobind.h>

#include "bindings/cuda_call.h"
#include "bindings/module.h"
#include "core/contract.h"
#include "cuda/layout.h"
#include "ops/attn_prologue.h"
#include "ops/copy_pages.h"
#include "ops/dmel_embed.h"
#include "ops/embed.h"
#include "ops/hmlp_fold.h"
#include "ops/linear.h"
#include "ops/lm_head.h"
#include "ops/moe.h"
#include "ops/rms_norm.h"
#include "ops/router.h"
#include "ops/sconv_norm.h"
#include "ops/session_attn.h"

namespace tml {
namespace {

void pack_weight(nb::handle w_h, nb::handle packed_h) {
  Call call("cuda_pack_weight");
  const Tensor w = call.bf16(w_h, "w"), packed = call.bf16(packed_h, "packed");
  w.rank(2).rows_contiguous();
  check_packed(packed, cuda::packed_elements(w.size(0), w.size(1)));
  const PackWeightParams params{
      w.data(), packed.data(), w.stride(0), w.size(0), w.size(1), DType::kBf16, 0};
  TML_RUN(call, pack_weight, params);
}

void linear(nb::handle x_h, nb::handle weight_h, nb::handle y_h) {
  Call call("cuda_linear");
  const Tensor x = call.bf16(x_h, "x"), weight = call.bf16(weight_h, "weight");
  const Tensor y = call.tensor(y_h, "out");
  x.rank(2);
  check_rows16(x);
  if (x.size(1) == 0) x.refuse("[T, K] with K > 0", "K = 0");
  y.shape({x.size(0), kAny}).rows_contiguous();
  if (y.type() != DType::kBf16) y.dtype(DType::kF32);
  check_packed(weight, cuda::packed_elements(y.size(1), x.size(1)));
  const LinearParams params{x.data(),     weight.data(), y.data(),  x.stride(0),
                            y.stride(0),  x.size(0),     x.size(1), y.size(1),
                            DType::kBf16, y.type(),      0};
  TML_RUN(call, linear, params);
}

void rms_norm(nb::handle x_h, nb::handle weight_h, float eps, float divisor, bool use_gelu,
              nb::handle y_h) {
  Call call("cuda_rms_norm");
  const Tensor x = call.tensor(x_h, "x"), weight = call.tensor(weight_h, "weight");
  const Tensor y = call.tensor(y_h, "out");
  x.floating().rank(2).rows_contiguous();
  weight.dtype(x.type()).shape({x.size(1)}).contiguous();
  y.dtype(x.type()).shape({x.size(0), x.size(1)}).rows_contiguous();
  const RmsNormParams params{x.data(),    weight.data(), y.data(),  x.stride(0),
                             y.stride(0), x.size(0),     x.size(1), eps,
                             divisor,     use_gelu,      x.type(),  0};
  TML_RUN(call, rms_norm, params);
}

void embed(nb::handle ids_h, nb::handle table_h, nb::handle weight_h, float eps, nb::handle y_h) {
  Call call("cuda_embed");
  const Tensor ids = call.tensor(ids_h, "ids"), table = call.tensor(table_h, "table");
  const Tensor weight = call.tensor(weight_h, "weight"), y = call.tensor(y_h, "out");
  ids.dtype(DType::kI64).rank(1).contiguous();
  table.floating().rank(2).rows_contiguous();
  weight.dtype(table.type()).shape({table.size(1)}).contiguous();
  y.dtype(table.type()).shape({ids.size(0), table.size(1)}).rows_contiguous();
  const EmbedParams params{ids.data<const std::int64_t>(),
                           table.data(),
                           weight.data(),
                           y.data(),
                           table.stride(0),
                           y.stride(0),
                           ids.size(0),
                           table.size(1),
                           eps,
                           table.type(),
                           0};
  TML_RUN(call, embed, params);
}

void dmel_embed(nb::handle bins_h, nb::handle table_h, std::int64_t num_levels, nb::handle weight_h,
                float eps, nb::handle y_h) {
  Call call("cuda_dmel_embed");
  const Tensor bins = call.tensor(bins_h, "bins"), table = call.tensor(table_h, "table");
  const Tensor weight = call.tensor(weight_h, "weight"), y = call.tensor(y_h, "out");
  bins.dtype(DType::kI32).rank(2).contiguous();
  table.floating().rank(2).rows_contiguous();
  if (num_levels < 1 || table.size(0) != bins.size(1) * num_levels)
    table.refuse(std::to_string(bins.size(1)) + " channels * num_levels rows high",
                 std::to_string(table.size(0)) + " rows");
  weight.dtype(table.type()).shape({table.size(1)}).contiguous();
  y.dtype(table.type()).shape({bins.size(0), table.size(1)}).rows_contiguous();
  const DmelEmbedParams params{bins.data<const std::int32_t>(),
                               table.data(),
                               weight.data(),
                               y.data(),
                               table.stride(0),
                               y.stride(0),
                               bins.size(0),
                               bins.size(1),
                               num_levels,
                               table.size(1),
                               eps,
                               table.type(),
                               0};
  TML_RUN(call, dmel_embed, params);
}

StepBatch batch_of(Call& call, nb::handle cu_tokens_h, nb::handle slots_h, nb::handle start_pos_h,
                   nb::handle visible_end_h, std::int64_t num_tokens) {
  const Tensor cu_tokens = call.tensor(cu_tokens_h, "cu_tokens");
  const Tensor slots = call.tensor(slots_h, "slots");
  slots.dtype(DType::kI32).rank(1).contiguous();
  const std::int64_t num_seqs = slots.size(0);
  cu_tokens.dtype(DType::kI32).shape({num_seqs + 1}).contiguous();
  if (num_seqs == 0 && num_tokens > 0) slots.refuse("of at least one sequence", "none");
  StepBatch batch{};
  batch.cu_tokens = cu_tokens.data<const std::int32_t>();
  batch.slots = slots.data<const std::int32_t>();
  batch.num_seqs = static_cast<std::int32_t>(num_seqs);
  batch.num_tokens = num_tokens;
  if (!start_pos_h.is_none()) {
    const Tensor start_pos = call.tensor(start_pos_h, "start_pos");
    start_pos.dtype(DType::kI64).shape({num_seqs}).contiguous();
    batch.start_pos = start_pos.data<const std::int64_t>();
  }
  if (!visible_end_h.is_none()) {
    const Tensor visible_end = call.tensor(visible_end_h, "visible_end");
    visible_end.dtype(DType::kI64).shape({num_tokens}).contiguous();
    batch.visible_end = visible_end.data<const std::int64_t>();
  }
  return batch;
}

ConvRows conv_of(const char* op, const Tensor& rows, std::int64_t layer, std::int64_t channel,
                 std::int64_t num_channels, DType dtype) {
  rows.dtype(dtype).shape({kAny, kAny, contract::kConvTaps - 1, kAny}).rows_contiguous();
  if (layer < 0 || layer >= rows.size(1))
    throw ArgumentError(std::string(op) + ": conv layer must be in [0, " +
                        std::to_string(rows.size(1)) + "), got " + std::to_string(layer));
  if (channel < 0 || channel > rows.size(3) - num_channels)
    rows.refuse("at least " + std::to_string(num_channels) + " channels wide from channel " +
                    std::to_string(channel),
                std::to_string(rows.size(3)) + " wide");
  const std::int64_t first = layer * rows.stride(1) + channel;
  return {rows.data<char>() + first * static_cast<std::int64_t>(size_of(dtype)), rows.stride(0),
          rows.stride(2)};
}

KvPages pages_of(Call& call, const char* op, nb::handle pages_h, std::int64_t layer,
                 nb::handle table_h) {
  const Tensor pages = call.bf16(pages_h, "pages"), table = call.tensor(table_h, "table");
  pages.shape({kAny, kAny, kAny, 2, kAny}).contiguous().aligned(128);
  table.dtype(DType::kI32).rank(2).contiguous();
  const std::int64_t width = pages.size(4);
  if (width == 0 || width % contract::kPageLen != 0)
    pages.refuse("[..., 2, 128 * head_dim]", std::to_string(width) + " wide");
  if (layer < 0 || layer >= pages.size(1))
    throw ArgumentError(std::string(op) + ": layer must be in [0, " +
                        std::to_string(pages.size(1)) + "), got " + std::to_string(layer));
  const std::int64_t layer_stride = pages.size(2) * 2 * width;
  KvPages out{};
  out.pages = pages.data<std::uint16_t>() + layer * layer_stride;
  out.page_stride = pages.size(1) * layer_stride;
  out.head_stride = 2 * width;
  out.table = table.data<const std::int32_t>();
  out.table_row_stride = table.size(1);
  out.num_kv_heads = static_cast<std::int32_t>(pages.size(2));
  out.head_dim = static_cast<std::int32_t>(width / contract::kPageLen);
  return out;
}

void sconv_norm(nb::handle x_h, nb::handle residual_h, nb::handle conv_weight_h,
                nb::handle norm_weight_h, float eps, nb::handle conv_rows_h,
                std::int64_t conv_layer, std::int64_t channel, nb::handle cu_tokens,
                nb::handle slots, nb::handle normed_h) {
  static constexpr const char* kOp = "cuda_sconv_norm";
  Call call(kOp);
  const Tensor x = call.tensor(x_h, "x"), residual = call.tensor(residual_h, "residual");
  const Tensor conv_weight = call.tensor(conv_weight_h, "conv_weight");
  const Tensor conv_rows = call.tensor(conv_rows_h, "conv_rows");
  x.floating().rank(2).rows_contiguous();
  const std::int64_t num_tokens = x.size(0), dim = x.size(1);
  residual.dtype(x.type()).shape({num_tokens, dim}).rows_contiguous();
  conv_weight.dtype(DType::kF32).shape({dim, contract::kConvTaps}).contiguous().aligned(16);
  SconvNormParams params{};
  if (norm_weight_h.is_none() != normed_h.is_none())
    throw ArgumentError("cuda_sconv_norm: out and norm_weight go together, got one of them");
  if (!norm_weight_h.is_none()) {
    const Tensor norm_weight = call.tensor(norm_weight_h, "norm_weight");
    const Tensor normed = call.tensor(normed_h, "out");
    norm_weight.dtype(x.type()).shape({dim}).contiguous();
    normed.dtype(x.type()).shape({num_tokens, dim}).rows_contiguous();
    params.norm_weight = norm_weight.data();
    params.normed = normed.data();
    params.normed_row_stride = normed.stride(0);
  }
  params.batch = batch_of(call, cu_tokens, slots, nb::none(), nb::none(), num_tokens);
  params.conv = conv_of(kOp, conv_rows, conv_layer, channel, dim, x.type());
  params.x = x.data();
  params.residual = residual.data();
  params.conv_weight = conv_weight.data<const float>();
  params.x_row_stride = x.stride(0);
  params.residual_row_stride = residual.stride(0);
  params.dim = dim;
  params.eps = eps;
  params.dtype = x.type();
  TML_RUN(call, sconv_norm, params);
}

void attn_prologue(nb::handle qkvr_h, nb::handle k_conv_h, nb::handle v_conv_h, nb::handle q_norm_h,
                   nb::handle k_norm_h, float eps, float log_floor, float log_alpha,
                   nb::handle pages_h, std::int64_t layer, nb::handle table_h,
                   nb::handle conv_rows_h, std::int64_t conv_layer, std::int64_t k_channel,
                   std::int64_t v_channel, nb::handle cu_tokens, nb::handle slots,
                   nb::handle start_pos, nb::handle q_h, nb::handle r_h) {
  static constexpr const char* kOp = "cuda_attn_prologue";
  Call call(kOp);
  const Tensor qkvr = call.bf16(qkvr_h, "qkvr");
  const Tensor k_conv = call.tensor(k_conv_h, "k_conv"), v_conv = call.tensor(v_conv_h, "v_conv");
  const Tensor q_norm = call.bf16(q_norm_h, "q_norm"), k_norm = call.bf16(k_norm_h, "k_norm");
  const Tensor conv_rows = call.bf16(conv_rows_h, "conv_rows");
  const Tensor q = call.bf16(q_h, "q_out"), r = call.bf16(r_h, "r_out");
  qkvr.rank(2).rows_contiguous();
  AttnPrologueParams params{};
  params.pages = pages_of(call, kOp, pages_h, layer, table_h);
  const std::int64_t dim = params.pages.head_dim, channels = params.pages.num_kv_heads * dim;
  q.shape({qkvr.size(0), kAny, dim}).contiguous().aligned(16);
  r.shape({qkvr.size(0), q.size(1), kAny}).contiguous();
  qkvr.shape({kAny, q.size(1) * (dim + r.size(2)) + 2 * channels});
  for (const Tensor* taps : {&k_conv, &v_conv})
    taps->dtype(DType::kF32).shape({channels, contract::kConvTaps}).contiguous().aligned(16);
  q_norm.shape({dim}).contiguous();
  k_norm.shape({dim}).contiguous();
  if (start_pos.is_none())
    throw ArgumentError("cuda_attn_prologue: start_pos must be a tensor, got None");
  params.batch = batch_of(call, cu_tokens, slots, start_pos, nb::none(), qkvr.size(0));
  params.k_rows = conv_of(kOp, conv_rows, conv_layer, k_channel, channels, DType::kBf16);
  params.v_rows = conv_of(kOp, conv_rows, conv_layer, v_channel, channels, DType::kBf16);
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
  params.dtype = DType::kBf16;
  TML_RUN(call, attn_prologue, params);
}

void session_attn(nb::handle q_h, nb::handle r_h, nb::handle rel_bank_h, nb::handle pages_h,
                  std::int64_t layer, nb::handle table_h, nb::handle cu_tokens, nb::handle slots,
                  nb::handle start_pos, nb::handle visible_end, std::int64_t window, float scale,
                  std::int64_t rel_len, nb::handle out_h, nb::handle lse_h, nb::handle workspace) {
  static constexpr const char* kOp = "cuda_session_attn";
  Call call(kOp);
  const Tensor q = call.bf16(q_h, "q"), r = call.bf16(r_h, "r");
  const Tensor rel_bank = call.bf16(rel_bank_h, "rel_bank"), out = call.bf16(out_h, "out");
  SessionAttnParams params{};
  params.kv = pages_of(call, kOp, pages_h, layer, table_h);
  const std::int64_t dim = params.kv.head_dim, kv_heads = params.kv.num_kv_heads;
  q.shape({kAny, kAny, dim}).contiguous().aligned(16);
  const std::int64_t num_tokens = q.size(0), heads = q.size(1);
  if (kv_heads == 0 || heads % kv_heads != 0 || heads / kv_heads > 64 || heads == 0)
    q.refuse("of heads that are 1 to 64 times the " + std::to_string(kv_heads) + " KV heads",
             std::to_string(heads) + " heads");
  r.shape({num_tokens, heads, kAny}).contiguous().aligned(4);
  if (rel_len < 1)
    throw ArgumentError("cuda_session_attn: rel_len must be >= 1, got " + std::to_string(rel_len));
  rel_bank.shape({(r.size(2) + 1) / 2, rel_len + 2 * kRelPad, 2}).contiguous().aligned(4);
  out.shape({num_tokens, heads * dim}).contiguous().aligned(4);
  if (!lse_h.is_none()) {
    const Tensor lse = call.tensor(lse_h, "lse");
    lse.dtype(DType::kF32).shape({num_tokens, heads}).contiguous();
    params.lse = lse.data<float>();
  }
  if (window < 0)
    throw ArgumentError("cuda_session_attn: window must be >= 0 (0: all keys), got " +
                        std::to_string(window));
  params.batch = batch_of(call, cu_tokens, slots, start_pos, visible_end, num_tokens);
  if (params.batch.start_pos == nullptr || params.batch.visible_end == nullptr)
    throw ArgumentError("cuda_session_attn: start_pos and visible_end must be tensors, got None");
  call.workspace(workspace);
  params.q = q.data();
  params.r = r.data();
  params.rel_bank = rel_bank.data();
  params.out = out.data();
  params.window = window;
  params.rel_len = rel_len;
  params.rel_dim = static_cast<std::int32_t>(r.size(2));
  params.num_heads = static_cast<std::int32_t>(heads);
  params.scale = scale;
  params.dtype = DType::kBf16;
  TML_RUN(call, session_attn, params);
}

std::int64_t session_attn_workspace(nb::handle q_h, std::int32_t num_seqs,
                                    std::int32_t num_kv_heads, std::int64_t max_pages,
                                    std::int64_t window) {
  Call call("cuda_session_attn");
  const Tensor q = call.bf16(q_h, "q");
  q.rank(3);
  [[maybe_unused]] SessionAttnParams params{};
  params.batch.num_tokens = q.size(0);
  params.batch.num_seqs = num_seqs;
  params.num_heads = static_cast<std::int32_t>(q.size(1));
  params.kv.num_kv_heads = num_kv_heads;
  params.kv.head_dim = static_cast<std::int32_t>(q.size(2));
  params.kv.table_row_stride = max_pages;
  params.window = window;
  if (num_kv_heads < 1 || q.size(1) < num_kv_heads || q.size(1) / num_kv_heads > 64)
    q.refuse("of heads that are 1 to 64 times the " + std::to_string(num_kv_heads) + " KV heads",
             std::to_string(q.size(1)) + " heads");
  return static_cast<std::int64_t>(TML_CUDA_OR(
      cuda::session_attn_workspace_bytes(params, cuda::num_sms(q.device_id())), std::size_t{0}));
}

void router(nb::handle x_h, nb::handle weight_h, nb::handle bias_h, nb::handle ids_h,
            nb::handle weights_h, nb::handle gammas_h, nb::handle logits_h, float scale) {
  Call call("cuda_router");
  const Tensor x = call.tensor(x_h, "x"), weight = call.tensor(weight_h, "weight");
  const Tensor bias = call.tensor(bias_h, "bias"), ids = call.tensor(ids_h, "expert_ids");
  const Tensor weights = call.tensor(weights_h, "weights");
  const Tensor gammas = call.tensor(gammas_h, "gammas"), logits = call.tensor(logits_h, "logits");
  x.floating().rank(2).rows_contiguous();
  const std::int64_t num_tokens = x.size(0);
  bias.dtype(DType::kF32).rank(1).contiguous();
  ids.dtype(DType::kI32).shape({num_tokens, kAny}).contiguous();
  const std::int64_t num_experts = bias.size(0), top_k = ids.size(1);
  weights.dtype(DType::kF32).shape({num_tokens, top_k}).contiguous();
  gammas.dtype(DType::kF32).shape({num_tokens, kAny}).contiguous();
  const std::int64_t num_outputs = num_experts + gammas.size(1);
  weight.dtype(DType::kF32).shape({num_outputs, x.size(1)}).contiguous();
  logits.dtype(DType::kF32).shape({num_tokens, num_outputs}).contiguous();
  if (top_k < 1 || top_k > num_experts)
    ids.refuse("1 to " + std::to_string(num_experts) + " wide (top_k)", std::to_string(top_k));
  if (num_outputs > kRouterMaxOutputs)
    throw ArgumentError("cuda_router: experts + shared must be at most " +
                        std::to_string(kRouterMaxOutputs) + ", got " + std::to_string(num_outputs));
  const RouterParams params{x.data(),
                            weight.data(),
                            bias.data<float>(),
                            ids.data<std::int32_t>(),
                            weights.data<float>(),
                            gammas.data<float>(),
                            logits.data<float>(),
                            x.stride(0),
                            num_tokens,
                            x.size(1),
                            static_cast<std::int32_t>(num_experts),
                            static_cast<std::int32_t>(gammas.size(1)),
                            static_cast<std::int32_t>(top_k),
                            scale,
                            x.type(),
                            0};
  TML_RUN(call, router, params);
}

std::int64_t w13_elements(std::int64_t experts, std::int64_t width, std::int64_t hidden) {
  return experts * ((width + cuda::kBlockUnits - 1) / cuda::kBlockUnits) * cuda::blocks_of(hidden) *
         cuda::kBlockElements;
}

void pack_experts(nb::handle gate_up_h, nb::handle down_h, nb::handle w13_h, nb::handle w2_h) {
  Call call("cuda_pack_experts");
  const Tensor gate_up = call.bf16(gate_up_h, "gate_up"), down = call.bf16(down_h, "down");
  const Tensor w13 = call.bf16(w13_h, "w13"), w2 = call.bf16(w2_h, "w2");
  gate_up.rank(3).contiguous();
  const std::int64_t count = gate_up.size(0), width = gate_up.size(1) / 2, hidden = gate_up.size(2);
  if (gate_up.size(1) % 2 != 0) gate_up.refuse("[E, 2I, H]", "an odd second dimension");
  down.shape({count, hidden, width}).contiguous();
  check_packed(w13, w13_elements(count, width, hidden));
  check_packed(w2, count * cuda::packed_elements(hidden, width));
  const PackExpertsParams params{gate_up.data(), down.data(), w13.data(),   w2.data(), count,
                                 hidden,         width,       DType::kBf16, 0};
  TML_RUN(call, pack_experts, params);
}

MoeParams moe_sizes(std::int64_t num_tokens, std::int64_t hidden, std::int64_t width,
                    std::int64_t num_experts, std::int64_t num_shared, std::int64_t top_k) {
  MoeParams params{};
  params.num_tokens = num_tokens;
  params.hidden = hidden;
  params.width = width;
  params.num_experts = static_cast<std::int32_t>(num_experts);
  params.num_shared = static_cast<std::int32_t>(num_shared);
  params.top_k = static_cast<std::int32_t>(top_k);
  params.dtype = DType::kBf16;
  return params;
}

std::int64_t moe_workspace(std::int64_t num_tokens, std::int64_t hidden, std::int64_t width,
                           std::int64_t num_experts, std::int64_t num_shared, std::int64_t top_k) {
  require_build("cuda_moe_workspace");
  [[maybe_unused]] const MoeParams params =
      moe_sizes(num_tokens, hidden, width, num_experts, num_shared, top_k);
  return static_cast<std::int64_t>(TML_CUDA_OR(cuda::moe_workspace_bytes(params), std::size_t{0}));
}

void moe(nb::handle x_h, nb::handle ids_h, nb::handle weights_h, nb::handle gammas_h,
         nb::handle w13_h, nb::handle w2_h, std::int64_t num_experts, std::int64_t width,
         nb::handle out_h, nb::handle gate_up_h, nb::handle workspace) {
  Call call("cuda_moe");
  const Tensor x = call.bf16(x_h, "x"), ids = call.tensor(ids_h, "expert_ids");
  const Tensor weights = call.tensor(weights_h, "weights");
  const Tensor gammas = call.tensor(gammas_h, "gammas");
  const Tensor w13 = call.bf16(w13_h, "w13"), w2 = call.bf16(w2_h, "w2");
  const Tensor out = call.bf16(out_h, "out");
  x.rank(2);
  check_rows16(x);
  const std::int64_t num_tokens = x.size(0), hidden = x.size(1);
  out.shape({num_tokens, hidden}).rows_contiguous();
  ids.dtype(DType::kI32).shape({num_tokens, kAny}).contiguous();
  const std::int64_t top_k = ids.size(1);
  weights.dtype(DType::kF32).shape({num_tokens, top_k}).contiguous();
  gammas.dtype(DType::kF32).shape({num_tokens, kAny}).contiguous();
  const std::int64_t num_shared = gammas.size(1), experts = num_experts + num_shared;
  if (width < 1 || num_experts < 1)
    throw ArgumentError("cuda_moe: width and num_experts must be positive");
  check_packed(w13, w13_elements(experts, width, hidden));
  check_packed(w2, experts * cuda::packed_elements(hidden, width));
  MoeParams params = moe_sizes(num_tokens, hidden, width, num_experts, num_shared, top_k);
  if (!gate_up_h.is_none()) {
    const Tensor gate_up = call.bf16(gate_up_h, "gate_up");
    gate_up.shape({num_tokens, top_k + num_shared, 2 * width}).contiguous();
    params.gate_up = gate_up.data();
  }
  call.workspace(workspace);
  params.x = x.data();
  params.expert_ids = ids.data<const std::int32_t>();
  params.weights = weights.data<const float>();
  params.gammas = gammas.data<const float>();
  params.w13 = w13.data();
  params.w2 = w2.data();
  params.y = out.data();
  params.x_row_stride = x.stride(0);
  params.y_row_stride = out.stride(0);
  TML_RUN(call, moe, params);
}

LmHeadInput head_of(const Tensor& h, const Tensor& weight, std::int64_t vocab_size) {
  h.rank(2);
  check_rows16(h);
  if (vocab_size < 1) weight.refuse("of a vocabulary of at least 1", std::to_string(vocab_size));
  check_packed(weight, cuda::packed_elements(vocab_size, h.size(1)));
  return {h.data(), weight.data(), h.stride(0), h.size(0), h.size(1), vocab_size, DType::kBf16};
}

std::int64_t lm_head_workspace(std::int64_t num_tokens, std::int64_t vocab_size) {
  require_build("cuda_lm_head_workspace");
  [[maybe_unused]] LmHeadInput input{};
  input.num_tokens = num_tokens;
  input.vocab_size = vocab_size;
  return static_cast<std::int64_t>(
      TML_CUDA_OR(cuda::lm_head_workspace_bytes(input), std::size_t{0}));
}

void lm_head_logprobs(nb::handle h_h, nb::handle weight_h, std::int64_t vocab_size,
                      nb::handle targets_h, nb::handle out_h, nb::handle workspace) {
  Call call("cuda_lm_head_logprobs");
  const Tensor h = call.bf16(h_h, "h"), weight = call.bf16(weight_h, "weight");
  const Tensor targets = call.tensor(targets_h, "targets"), out = call.tensor(out_h, "out");
  LmHeadLogprobsParams params{};
  params.input = head_of(h, weight, vocab_size);
  targets.dtype(DType::kI64).shape({h.size(0)}).contiguous();
  out.dtype(DType::kF32).shape({h.size(0)}).contiguous();
  params.targets = targets.data<const std::int64_t>();
  params.logprobs = out.data<float>();
  call.workspace(workspace);
  TML_RUN(call, lm_head_logprobs, params);
}

void lm_head_sample(nb::handle h_h, nb::handle weight_h, std::int64_t vocab_size,
                    nb::handle temperature_h, nb::handle top_k_h, nb::handle top_p_h,
                    nb::handle seed_h, nb::handle position_h, nb::handle allowed_h,
                    nb::handle tokens_h, nb::handle logprobs_h, nb::handle workspace) {
  Call call("cuda_lm_head_sample");
  const Tensor h = call.bf16(h_h, "h"), weight = call.bf16(weight_h, "weight");
  const Tensor temperature = call.tensor(temperature_h, "temperature");
  const Tensor seed = call.tensor(seed_h, "seed"), position = call.tensor(position_h, "position");
  const Tensor tokens = call.tensor(tokens_h, "tokens");
  const Tensor logprobs = call.tensor(logprobs_h, "logprobs");
  LmHeadSampleParams params{};
  params.input = head_of(h, weight, vocab_size);
  const std::int64_t rows = h.size(0);
  temperature.dtype(DType::kF32).shape({rows}).contiguous();
  if (!top_k_h.is_none()) {
    const Tensor top_k = call.tensor(top_k_h, "top_k");
    top_k.dtype(DType::kI32).shape({rows}).contiguous();
    params.top_k = top_k.data<const std::int32_t>();
  }
  if (!top_p_h.is_none()) {
    const Tensor top_p = call.tensor(top_p_h, "top_p");
    top_p.dtype(DType::kF32).shape({rows}).contiguous();
    params.top_p = top_p.data<const float>();
  }
  seed.dtype(DType::kI64).shape({rows}).contiguous();
  position.dtype(DType::kI64).shape({rows}).contiguous();
  tokens.dtype(DType::kI64).shape({rows}).contiguous();
  logprobs.dtype(DType::kF32).shape({rows}).contiguous();
  if (!allowed_h.is_none()) {
    const Tensor allowed = call.tensor(allowed_h, "allowed");
    allowed.dtype(DType::kI32).shape({rows, ceil_div(vocab_size, 32)}).contiguous();
    params.allowed = allowed.data<const std::int32_t>();
  }
  params.temperature = temperature.data<const float>();
  params.seed = seed.data<const std::int64_t>();
  params.position = position.data<const std::int64_t>();
  params.tokens = tokens.data<std::int64_t>();
  params.logprobs = logprobs.data<float>();
  call.workspace(workspace);
  TML_RUN(call, lm_head_sample, params);
}

void hmlp_fold(nb::handle x_h, std::int64_t frame_fold, std::int64_t side_fold, nb::handle y_h) {
  Call call("cuda_hmlp_fold");
  const Tensor x = call.tensor(x_h, "x"), y = call.bf16(y_h, "out");
  x.floating().rank(5).contiguous();
  if (frame_fold < 1 || side_fold < 1 || x.size(1) % frame_fold != 0 ||
      x.size(2) % side_fold != 0 || x.size(3) != x.size(2))
    x.refuse("[P, T, S, S, C] with T a multiple of " + std::to_string(frame_fold) + ", S of " +
                 std::to_string(side_fold),
             "[*, " + std::to_string(x.size(1)) + ", " + std::to_string(x.size(2)) + ", " +
                 std::to_string(x.size(3)) + ", *]");
  const std::int64_t side = x.size(2) / side_fold;
  const std::int64_t width = frame_fold * side_fold * side_fold * x.size(4);
  y.shape({x.size(0) * (x.size(1) / frame_fold) * side * side, (width + 7) / 8 * 8})
      .contiguous()
      .aligned(16);
  const HmlpFoldParams params{x.data(),
                              y.data(),
                              y.size(1),
                              x.size(0),
                              static_cast<std::int32_t>(x.size(1)),
                              static_cast<std::int32_t>(x.size(2)),
                              static_cast<std::int32_t>(x.size(4)),
                              static_cast<std::int32_t>(frame_fold),
                              static_cast<std::int32_t>(side_fold),
                              x.type()};
  TML_RUN(call, hmlp_fold, params);
}

void copy_pages(nb::handle source_h, nb::handle target_h, nb::handle source_ids_h,
                nb::handle target_ids_h, std::int64_t last_len) {
  Call call("cuda_copy_pages");
  const Tensor source = call.bf16(source_h, "source"), target = call.bf16(target_h, "target");
  source.shape({kAny, kAny, kAny, 2, kAny}).contiguous().aligned(16);
  const std::int64_t width = source.size(4);
  if (width == 0 || width % (8 * contract::kPageLen) != 0)
    source.refuse("[..., 2, 128 * head_dim], head_dim a multiple of 8",
                  std::to_string(width) + " wide");
  target.shape({kAny, source.size(1), source.size(2), 2, width}).contiguous().aligned(16);
  if (last_len < 1 || last_len > contract::kPageLen)
    throw ArgumentError("cuda_copy_pages: last_len must be in [1, 128], got " +
                        std::to_string(last_len));
  CopyPagesParams params{};
  params.num_pages = -1;
  const auto ids_of = [&](nb::handle ids_h, const char* name,
                          std::int64_t count) -> const std::int32_t* {
    const std::int32_t* out = nullptr;
    if (!ids_h.is_none()) {
      const Tensor ids = call.tensor(ids_h, name);
      ids.dtype(DType::kI32).rank(1).contiguous();
      count = ids.size(0);
      out = ids.data<const std::int32_t>();
    }
    if (params.num_pages >= 0 && count != params.num_pages)
      throw ArgumentError("cuda_copy_pages: target must be " + std::to_string(params.num_pages) +
                          " pages like source, got " + std::to_string(count));
    params.num_pages = count;
    return out;
  };
  params.source_ids = ids_of(source_ids_h, "source_ids", source.size(0));
  params.target_ids = ids_of(target_ids_h, "target_ids", target.size(0));
  params.source = source.data();
  params.target = target.data();
  params.page_bytes = source.size(1) * source.size(2) * 2 * width * 2;
  params.head_dim = static_cast<std::int32_t>(width / contract::kPageLen);
  params.last_len = static_cast<std::int32_t>(last_len);
  TML_RUN(call, copy_pages, params);
}

}  // namespace

void bind_cuda(nb::module_& m) {
  m.def(
      "cuda_problem", [](int device) { return nb::str(problem_of(device).c_str()); },
      nb::arg("device"), "Why the kernels cannot run on a CUDA device; empty if they can.");
  m.def("cuda_pack_weight", &pack_weight, nb::arg("w"), nb::arg("packed"));
  m.def("cuda_linear", &linear, nb::arg("x"), nb::arg("weight"), nb::arg("out"));
  m.def("cuda_rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"),
        nb::arg("divisor"), nb::arg("use_gelu"), nb::arg("out"));
  m.def("cuda_embed", &embed, nb::arg("ids"), nb::arg("table"), nb::arg("weight"), nb::arg("eps"),
        nb::arg("out"));
  m.def("cuda_dmel_embed", &dmel_embed, nb::arg("bins"), nb::arg("table"), nb::arg("num_levels"),
        nb::arg("weight"), nb::arg("eps"), nb::arg("out"));
  m.def("cuda_sconv_norm", &sconv_norm, nb::arg("x"), nb::arg("residual"), nb::arg("conv_weight"),
        nb::arg("norm_weight").none(), nb::arg("eps"), nb::arg("conv_rows"), nb::arg("conv_layer"),
        nb::arg("channel"), nb::arg("cu_tokens"), nb::arg("slots"), nb::arg("out").none());
  m.def("cuda_attn_prologue", &attn_prologue, nb::arg("qkvr"), nb::arg("k_conv"), nb::arg("v_conv"),
        nb::arg("q_norm"), nb::arg("k_norm"), nb::arg("eps"), nb::arg("log_floor"),
        nb::arg("log_alpha"), nb::arg("pages"), nb::arg("layer"), nb::arg("table"),
        nb::arg("conv_rows"), nb::arg("conv_layer"), nb::arg("k_channel"), nb::arg("v_channel"),
        nb::arg("cu_tokens"), nb::arg("slots"), nb::arg("start_pos").none(), nb::arg("q_out"),
        nb::arg("r_out"));
  m.def("cuda_session_attn_workspace", &session_attn_workspace, nb::arg("q"), nb::arg("num_seqs"),
        nb::arg("num_kv_heads"), nb::arg("max_pages"), nb::arg("window"));
  m.def("cuda_session_attn", &session_attn, nb::arg("q"), nb::arg("r"), nb::arg("rel_bank"),
        nb::arg("pages"), nb::arg("layer"), nb::arg("table"), nb::arg("cu_tokens"),
        nb::arg("slots"), nb::arg("start_pos").none(), nb::arg("visible_end").none(),
        nb::arg("window"), nb::arg("scale"), nb::arg("rel_len"), nb::arg("out"),
        nb::arg("lse").none(), nb::arg("workspace").none());
  m.def("cuda_router", &router, nb::arg("x"), nb::arg("weight"), nb::arg("bias"),
        nb::arg("expert_ids"), nb::arg("weights"), nb::arg("gammas"), nb::arg("logits"),
        nb::arg("scale"));
  m.def("cuda_pack_experts", &pack_experts, nb::arg("gate_up"), nb::arg("down"), nb::arg("w13"),
        nb::arg("w2"));
  m.def("cuda_moe_workspace", &moe_workspace, nb::arg("num_tokens"), nb::arg("hidden"),
        nb::arg("width"), nb::arg("num_experts"), nb::arg("num_shared"), nb::arg("top_k"));
  m.def("cuda_moe", &moe, nb::arg("x"), nb::arg("expert_ids"), nb::arg("weights"),
        nb::arg("gammas"), nb::arg("w13"), nb::arg("w2"), nb::arg("num_experts"), nb::arg("width"),
        nb::arg("out"), nb::arg("gate_up").none(), nb::arg("workspace").none());
  m.def("cuda_hmlp_fold", &hmlp_fold, nb::arg("x"), nb::arg("frame_fold"), nb::arg("side_fold"),
        nb::arg("out"));
  m.def("cuda_copy_pages", &copy_pages, nb::arg("source"), nb::arg("target"),
        nb::arg("source_ids").none(), nb::arg("target_ids").none(), nb::arg("last_len"));
  m.def("cuda_lm_head_workspace", &lm_head_workspace, nb::arg("num_tokens"), nb::arg("vocab_size"));
  m.def("cuda_lm_head_logprobs", &lm_head_logprobs, nb::arg("h"), nb::arg("weight"),
        nb::arg("vocab_size"), nb::arg("targets"), nb::arg("out"), nb::arg("workspace").none());
  m.def("cuda_lm_head_sample", &lm_head_sample, nb::arg("h"), nb::arg("weight"),
        nb::arg("vocab_size"), nb::arg("temperature"), nb::arg("top_k").none(),
        nb::arg("top_p").none(), nb::arg("seed"), nb::arg("position"), nb::arg("allowed").none(),
        nb::arg("tokens"), nb::arg("logprobs"), nb::arg("workspace").none());
}

}  // namespace tml
