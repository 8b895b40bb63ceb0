// The gradients of the device ops. As in cuda.cpp, what only values could tell (ids, bins, the
// bounds of sequences) is the caller's to check.
#include <nanobind/nanobind.h>

#include <algorithm>

#include "bindings/cuda_call.h"
#include "bindings/module.h"
#include "core/contract.h"
#include "ops/embed_bwd.h"
#include "ops/linear_logp.h"
#include "ops/linear_train.h"
#include "ops/moe_bwd.h"
#include "ops/rms_norm_bwd.h"
#include "ops/router.h"
#include "ops/router_bwd.h"
#include "ops/sconv_norm_bwd.h"

namespace tml {
namespace {

#ifdef TML_WITH_CUDA
#define TML_WORKSPACE(op, params) static_cast<std::int64_t>(cuda::op##_workspace_bytes(params))
#else
#define TML_WORKSPACE(op, params) (static_cast<void>(params), std::int64_t{0})
#endif

std::int64_t rms_norm_bwd_workspace(std::int64_t num_rows, std::int64_t dim) {
  require_build("cuda_rms_norm_bwd");
  RmsNormBwdParams params{};
  params.num_rows = num_rows;
  params.dim = dim;
  return TML_WORKSPACE(rms_norm_bwd, params);
}

void rms_norm_bwd(nb::handle dy_h, nb::handle x_h, nb::handle weight_h, float eps, float divisor,
                  bool use_gelu, nb::handle dx_h, nb::handle dweight_h, nb::handle workspace) {
  Call call("cuda_rms_norm_bwd");
  const Tensor dy = call.tensor(dy_h, "dy"), x = call.tensor(x_h, "x");
  const Tensor weight = call.tensor(weight_h, "weight"), dx = call.tensor(dx_h, "dx_out");
  const Tensor dweight = call.tensor(dweight_h, "dweight_out");
  x.floating().rank(2).rows_contiguous();
  const std::int64_t num_rows = x.size(0), dim = x.size(1);
  dy.dtype(x.type()).shape({num_rows, dim}).rows_contiguous();
  weight.dtype(x.type()).shape({dim}).contiguous();
  dx.dtype(x.type()).shape({num_rows, dim}).rows_contiguous();
  dweight.dtype(x.type()).shape({dim}).contiguous();
  call.workspace(workspace);
  const RmsNormBwdParams params{dy.data(),    x.data(),    weight.data(), dx.data(), dweight.data(),
                                dy.stride(0), x.stride(0), dx.stride(0),  num_rows,  dim,
                                eps,          divisor,     use_gelu,      x.type(),  0};
  TML_RUN(call, rms_norm_bwd, params);
}

// The arguments embed_bwd and dmel_embed_bwd share.
struct TableGrad {
  TableGrad(Call& call, nb::handle dy_h, nb::handle table_h, nb::handle weight_h,
            nb::handle dtable_h, nb::handle dweight_h, std::int64_t num_tokens)
      : dy(call.tensor(dy_h, "dy")),
        table(call.tensor(table_h, "table")),
        weight(call.tensor(weight_h, "weight")),
        dtable(call.tensor(dtable_h, "dtable_out")),
        dweight(call.tensor(dweight_h, "dweight_out")) {
    table.floating().rank(2).rows_contiguous();
    const std::int64_t dim = table.size(1);
    dy.dtype(table.type()).shape({num_tokens, dim}).rows_contiguous();
    weight.dtype(table.type()).shape({dim}).contiguous();
    dtable.dtype(table.type()).shape({table.size(0), dim}).contiguous();
    dweight.dtype(table.type()).shape({dim}).contiguous();
  }
  Tensor dy, table, weight, dtable, dweight;
};

std::int64_t embed_bwd_workspace(std::int64_t num_tokens, std::int64_t dim) {
  require_build("cuda_embed_bwd");
  EmbedBwdParams params{};
  params.num_tokens = num_tokens;
  params.dim = dim;
  return TML_WORKSPACE(embed_bwd, params);
}

void embed_bwd(nb::handle dy_h, nb::handle ids_h, nb::handle table_h, nb::handle weight_h,
               float eps, nb::handle dtable_h, nb::handle dweight_h, nb::handle workspace) {
  Call call("cuda_embed_bwd");
  const Tensor ids = call.tensor(ids_h, "ids");
  ids.dtype(DType::kI64).rank(1).contiguous();
  const TableGrad g(call, dy_h, table_h, weight_h, dtable_h, dweight_h, ids.size(0));
  call.workspace(workspace);
  const EmbedBwdParams params{g.dy.data(),     ids.data<const std::int64_t>(),
                              g.table.data(),  g.weight.data(),
                              g.dtable.data(), g.dweight.data(),
                              g.dy.stride(0),  g.table.stride(0),
                              ids.size(0),     g.table.size(0),
                              g.table.size(1), eps,
                              g.table.type(),  0};
  TML_RUN(call, embed_bwd, params);
}

std::int64_t dmel_embed_bwd_workspace(std::int64_t num_frames, std::int64_t dim) {
  require_build("cuda_dmel_embed_bwd");
  DmelEmbedBwdParams params{};
  params.num_frames = num_frames;
  params.dim = dim;
  params.dtype = DType::kF32;  // the larger of the two
  return TML_WORKSPACE(dmel_embed_bwd, params);
}

void dmel_embed_bwd(nb::handle dy_h, nb::handle bins_h, nb::handle table_h, std::int64_t num_levels,
                    nb::handle weight_h, float eps, nb::handle dtable_h, nb::handle dweight_h,
                    nb::handle workspace) {
  Call call("cuda_dmel_embed_bwd");
  const Tensor bins = call.tensor(bins_h, "bins");
  bins.dtype(DType::kI32).rank(2).contiguous();
  const TableGrad g(call, dy_h, table_h, weight_h, dtable_h, dweight_h, bins.size(0));
  if (num_levels < 1 || g.table.size(0) != bins.size(1) * num_levels)
    g.table.refuse(std::to_string(bins.size(1)) + " channels * num_levels rows high",
                   std::to_string(g.table.size(0)) + " rows");
  call.workspace(workspace);
  const DmelEmbedBwdParams params{g.dy.data(),
                                  bins.data<const std::int32_t>(),
                                  g.table.data(),
                                  g.weight.data(),
                                  g.dtable.data(),
                                  g.dweight.data(),
                                  g.dy.stride(0),
                                  g.table.stride(0),
                                  bins.size(0),
                                  bins.size(1),
                                  num_levels,
                                  g.table.size(1),
                                  eps,
                                  g.table.type(),
                                  0};
  TML_RUN(call, dmel_embed_bwd, params);
}

std::int64_t sconv_norm_bwd_workspace(std::int64_t num_tokens, std::int64_t dim) {
  require_build("cuda_sconv_norm_packed_bwd");
  SconvNormBwdParams params{};
  params.num_tokens = num_tokens;
  params.dim = dim;
  params.norm_weight = &params;  // with a norm: the larger of the two
  return TML_WORKSPACE(sconv_norm_bwd, params);
}

void sconv_norm_bwd(nb::handle dnormed_h, nb::handle dsum_h, nb::handle x_h, nb::handle sum_h,
                    nb::handle conv_weight_h, nb::handle norm_weight_h, float eps,
                    nb::handle cu_tokens_h, nb::handle dx_h, nb::handle dresidual_h,
                    nb::handle dconv_h, nb::handle dnorm_h, nb::handle workspace) {
  Call call("cuda_sconv_norm_packed_bwd");
  const Tensor dsum = call.tensor(dsum_h, "dresidual"), x = call.tensor(x_h, "x");
  const Tensor sum = call.tensor(sum_h, "residual");
  const Tensor conv_weight = call.tensor(conv_weight_h, "conv_weight");
  const Tensor cu_tokens = call.tensor(cu_tokens_h, "cu_tokens"), dx = call.tensor(dx_h, "dx_out");
  const Tensor dresidual = call.tensor(dresidual_h, "dresidual_out");
  const Tensor dconv = call.tensor(dconv_h, "dconv_out");
  x.floating().rank(2).rows_contiguous();
  const DType dtype = x.type();
  const std::int64_t num_tokens = x.size(0), dim = x.size(1);
  dsum.dtype(dtype).shape({num_tokens, dim}).rows_contiguous();
  sum.dtype(dtype).shape({num_tokens, dim}).rows_contiguous();
  conv_weight.dtype(DType::kF32).shape({dim, contract::kConvTaps}).contiguous();
  cu_tokens.dtype(DType::kI32).rank(1).contiguous();
  if (cu_tokens.size(0) == 0 || (cu_tokens.size(0) == 1 && num_tokens > 0))
    cu_tokens.refuse("[num_seqs + 1]", "[" + std::to_string(cu_tokens.size(0)) + "]");
  dx.dtype(dtype).shape({num_tokens, dim}).contiguous();
  dresidual.dtype(dtype).shape({num_tokens, dim}).contiguous();
  dconv.dtype(DType::kF32).shape({dim, contract::kConvTaps}).contiguous();
  SconvNormBwdParams params{};
  if (norm_weight_h.is_none() != dnormed_h.is_none() || dnormed_h.is_none() != dnorm_h.is_none())
    throw ArgumentError(
        "cuda_sconv_norm_packed_bwd: dnormed, norm_weight and dnorm_out go together, got some of "
        "them");
  if (!norm_weight_h.is_none()) {
    const Tensor dnormed = call.tensor(dnormed_h, "dnormed");
    const Tensor norm_weight = call.tensor(norm_weight_h, "norm_weight");
    const Tensor dnorm = call.tensor(dnorm_h, "dnorm_out");
    dnormed.dtype(dtype).shape({num_tokens, dim}).rows_contiguous();
    norm_weight.dtype(dtype).shape({dim}).contiguous();
    dnorm.dtype(dtype).shape({dim}).contiguous();
    params.dnormed = dnormed.data();
    params.dnormed_row_stride = dnormed.stride(0);
    params.norm_weight = norm_weight.data();
    params.dnorm = dnorm.data();
  }
  call.workspace(workspace);
  params.dsum = dsum.data();
  params.x = x.data();
  params.sum = sum.data();
  params.conv_weight = conv_weight.data<const float>();
  params.cu_tokens = cu_tokens.data<const std::int32_t>();
  params.dx = dx.data();
  params.dresidual = dresidual.data();
  params.dconv = dconv.data<float>();
  params.dsum_row_stride = dsum.stride(0);
  params.x_row_stride = x.stride(0);
  params.sum_row_stride = sum.stride(0);
  params.num_seqs = cu_tokens.size(0) - 1;
  params.num_tokens = num_tokens;
  params.dim = dim;
  params.eps = eps;
  params.dtype = dtype;
  TML_RUN(call, sconv_norm_bwd, params);
}

// One workspace for the three products: enough for each of them.
std::int64_t linear_train_workspace(std::int64_t num_tokens, std::int64_t in_dim,
                                    std::int64_t out_dim) {
  require_build("cuda_linear_train");
  LinearPlainParams plain{};
  plain.in_dim = in_dim;
  plain.out_dim = out_dim;
  LinearDgradParams dgrad{};
  dgrad.in_dim = in_dim;
  dgrad.out_dim = out_dim;
  LinearWgradParams wgrad{};
  wgrad.num_tokens = num_tokens;
  wgrad.in_dim = in_dim;
  wgrad.out_dim = out_dim;
  return std::max({TML_WORKSPACE(linear_plain, plain), TML_WORKSPACE(linear_dgrad, dgrad),
                   TML_WORKSPACE(linear_wgrad, wgrad)});
}

const Tensor& bf16_or_f32(const Tensor& out) {
  return out.type() == DType::kBf16 ? out : out.dtype(DType::kF32);
}

void linear_plain(nb::handle x_h, nb::handle w_h, nb::handle y_h, nb::handle workspace) {
  Call call("cuda_linear_plain");
  const Tensor x = call.bf16(x_h, "x"), w = call.bf16(w_h, "w"), y = call.tensor(y_h, "out");
  x.rank(2);
  check_rows16(x);
  if (x.size(1) == 0) x.refuse("[T, K] with K > 0", "K = 0");
  w.shape({kAny, x.size(1)}).rows_contiguous();
  bf16_or_f32(y).shape({x.size(0), w.size(0)}).rows_contiguous();
  call.workspace(workspace);
  const LinearPlainParams params{x.data(),    w.data(),     y.data(),  x.stride(0),
                                 w.stride(0), y.stride(0),  x.size(0), x.size(1),
                                 w.size(0),   DType::kBf16, y.type(),  0};
  TML_RUN(call, linear_plain, params);
}

void linear_dgrad(nb::handle dy_h, nb::handle w_h, nb::handle dx_h, nb::handle workspace) {
  Call call("cuda_linear_dgrad");
  const Tensor dy = call.bf16(dy_h, "dy"), w = call.bf16(w_h, "w"),
               dx = call.tensor(dx_h, "dx_out");
  dy.rank(2);
  check_rows16(dy);
  if (dy.size(1) == 0) dy.refuse("[T, N] with N > 0", "N = 0");
  w.shape({dy.size(1), kAny}).rows_contiguous();
  bf16_or_f32(dx).shape({dy.size(0), w.size(1)}).rows_contiguous();
  call.workspace(workspace);
  const LinearDgradParams params{dy.data(),   w.data(),     dx.data(),  dy.stride(0),
                                 w.stride(0), dx.stride(0), dy.size(0), w.size(1),
                                 w.size(0),   DType::kBf16, dx.type(),  0};
  TML_RUN(call, linear_dgrad, params);
}

void linear_wgrad(nb::handle dy_h, nb::handle x_h, nb::handle dw_h, nb::handle workspace) {
  Call call("cuda_linear_wgrad");
  const Tensor dy = call.bf16(dy_h, "dy"), x = call.bf16(x_h, "x"),
               dw = call.tensor(dw_h, "dw_out");
  dy.rank(2).rows_contiguous();
  x.shape({dy.size(0), kAny}).rows_contiguous();
  bf16_or_f32(dw).shape({dy.size(1), x.size(1)}).rows_contiguous();
  call.workspace(workspace);
  const LinearWgradParams params{dy.data(),   x.data(),     dw.data(),  dy.stride(0),
                                 x.stride(0), dw.stride(0), dy.size(0), x.size(1),
                                 dy.size(1),  DType::kBf16, dw.type(),  0};
  TML_RUN(call, linear_wgrad, params);
}

LmHeadInput logp_input(Call& call, nb::handle h_h, nb::handle weight_h, std::int64_t vocab_size) {
  const Tensor h = call.bf16(h_h, "h"), weight = call.bf16(weight_h, "weight");
  h.rank(2);
  check_rows16(h);
  if (h.size(1) == 0) h.refuse("[T, H] with H > 0", "H = 0");
  if (vocab_size < 1)
    throw ArgumentError("cuda_linear_logp: vocab_size must be >= 1, got " +
                        std::to_string(vocab_size));
  check_packed(weight, cuda::packed_elements(vocab_size, h.size(1)));
  return {h.data(), weight.data(), h.stride(0), h.size(0), h.size(1), vocab_size, DType::kBf16};
}

#ifdef TML_WITH_CUDA
#define TML_LOGP_WORKSPACE(op, params) \
  static_cast<std::int64_t>(           \
      cuda::op##_workspace_bytes(params, cuda::logp_tiling(params.input.vocab_size)))
#define TML_LOGP_RUN(call, op, params)                                    \
  (call).run([&](const cuda::Launch& launch) {                            \
    cuda::op(params, cuda::logp_tiling(params.input.vocab_size), launch); \
  })
#else
#define TML_LOGP_WORKSPACE(op, params) (static_cast<void>(params), std::int64_t{0})
#define TML_LOGP_RUN(call, op, params) static_cast<void>(params)
#endif

std::int64_t linear_logp_workspace(std::int64_t num_tokens, std::int64_t in_dim,
                                   std::int64_t vocab_size, bool is_bwd) {
  require_build("cuda_linear_logp");
  if (vocab_size < 1)
    throw ArgumentError("cuda_linear_logp: vocab_size must be >= 1, got " +
                        std::to_string(vocab_size));
  LinearLogpBwdParams bwd{};
  bwd.input.num_tokens = num_tokens;
  bwd.input.in_dim = in_dim;
  bwd.input.vocab_size = vocab_size;
  LinearLogpParams fwd{};
  fwd.input = bwd.input;
  return is_bwd ? TML_LOGP_WORKSPACE(linear_logp_bwd, bwd) : TML_LOGP_WORKSPACE(linear_logp, fwd);
}

void linear_logp(nb::handle h_h, nb::handle weight_h, std::int64_t vocab_size, nb::handle targets_h,
                 nb::handle logprobs_h, nb::handle entropy_h, nb::handle workspace) {
  Call call("cuda_linear_logp");
  LinearLogpParams params{};
  params.input = logp_input(call, h_h, weight_h, vocab_size);
  const std::int64_t num_tokens = params.input.num_tokens;
  const Tensor targets = call.tensor(targets_h, "targets");
  const Tensor logprobs = call.tensor(logprobs_h, "logprobs_out");
  targets.dtype(DType::kI64).shape({num_tokens}).contiguous();
  logprobs.dtype(DType::kF32).shape({num_tokens}).contiguous();
  if (!entropy_h.is_none()) {
    const Tensor entropy = call.tensor(entropy_h, "entropy_out");
    entropy.dtype(DType::kF32).shape({num_tokens}).contiguous();
    params.entropy = entropy.data<float>();
  }
  call.workspace(workspace);
  params.targets = targets.data<const std::int64_t>();
  params.logprobs = logprobs.data<float>();
  TML_LOGP_RUN(call, linear_logp, params);
}

void linear_logp_bwd(nb::handle h_h, nb::handle weight_h, nb::handle plain_h,
                     std::int64_t vocab_size, nb::handle targets_h, nb::handle d_logprobs_h,
                     nb::handle d_entropy_h, nb::handle logprobs_h, nb::handle dh_h,
                     nb::handle dw_h, nb::handle workspace) {
  Call call("cuda_linear_logp_bwd");
  LinearLogpBwdParams params{};
  params.input = logp_input(call, h_h, weight_h, vocab_size);
  const std::int64_t num_tokens = params.input.num_tokens, in_dim = params.input.in_dim;
  const Tensor plain = call.bf16(plain_h, "plain_weight");
  const Tensor targets = call.tensor(targets_h, "targets");
  const Tensor d_logprobs = call.tensor(d_logprobs_h, "d_logprobs");
  const Tensor logprobs = call.tensor(logprobs_h, "logprobs_out");
  const Tensor dh = call.bf16(dh_h, "dh_out"), dw = call.bf16(dw_h, "dw_out");
  plain.shape({kAny, in_dim}).rows_contiguous();
  if (plain.size(0) < vocab_size)
    plain.refuse("at least " + std::to_string(vocab_size) + " rows high",
                 std::to_string(plain.size(0)) + " rows");
  targets.dtype(DType::kI64).shape({num_tokens}).contiguous();
  d_logprobs.dtype(DType::kF32).shape({num_tokens}).contiguous();
  logprobs.dtype(DType::kF32).shape({num_tokens}).contiguous();
  dh.shape({num_tokens, in_dim}).contiguous();
  dw.shape({plain.size(0), in_dim}).contiguous();
  if (!d_entropy_h.is_none()) {
    const Tensor d_entropy = call.tensor(d_entropy_h, "d_entropy");
    d_entropy.dtype(DType::kF32).shape({num_tokens}).contiguous();
    params.d_entropy = d_entropy.data<const float>();
  }
  call.workspace(workspace);
  params.weight = plain.data();
  params.weight_row_stride = plain.stride(0);
  params.num_rows = plain.size(0);
  params.targets = targets.data<const std::int64_t>();
  params.d_logprobs = d_logprobs.data<const float>();
  params.logprobs = logprobs.data<float>();
  params.dh = dh.data();
  params.dw = dw.data();
  TML_LOGP_RUN(call, linear_logp_bwd, params);
}

std::int64_t router_bwd_workspace(std::int64_t num_tokens, std::int32_t num_outputs) {
  require_build("cuda_router_bwd");
  RouterBwdParams params{};
  params.num_tokens = num_tokens;
  params.num_experts = num_outputs;
  return TML_WORKSPACE(router_bwd, params);
}

void router_bwd(nb::handle x_h, nb::handle weight_h, nb::handle ids_h, nb::handle logits_h,
                nb::handle dweights_h, nb::handle dgammas_h, nb::handle dlogits_h, float scale,
                nb::handle dx_h, nb::handle dw_h, nb::handle dscale_h, nb::handle workspace) {
  Call call("cuda_router_bwd");
  const Tensor x = call.tensor(x_h, "x"), weight = call.tensor(weight_h, "weight");
  const Tensor ids = call.tensor(ids_h, "expert_ids"), logits = call.tensor(logits_h, "logits");
  const Tensor dweights = call.tensor(dweights_h, "dweights");
  const Tensor dgammas = call.tensor(dgammas_h, "dgammas"), dx = call.tensor(dx_h, "dx_out");
  const Tensor dw = call.tensor(dw_h, "dw_out"), dscale = call.tensor(dscale_h, "dscale_out");
  x.floating().rank(2).rows_contiguous();
  const std::int64_t num_tokens = x.size(0), dim = x.size(1);
  weight.dtype(DType::kF32).shape({kAny, dim}).contiguous();
  const std::int64_t num_outputs = weight.size(0);
  ids.dtype(DType::kI32).shape({num_tokens, kAny}).contiguous();
  dgammas.dtype(DType::kF32).shape({num_tokens, kAny}).contiguous();
  const std::int64_t top_k = ids.size(1), num_shared = dgammas.size(1);
  const std::int64_t num_experts = num_outputs - num_shared;
  if (num_outputs > kRouterMaxOutputs)
    weight.refuse("at most " + std::to_string(kRouterMaxOutputs) + " rows high",
                  std::to_string(num_outputs) + " rows");
  if (top_k < 1 || top_k > num_experts)
    ids.refuse("1 to " + std::to_string(num_experts) + " wide (top_k)", std::to_string(top_k));
  logits.dtype(DType::kF32).shape({num_tokens, num_outputs}).contiguous();
  dweights.dtype(DType::kF32).shape({num_tokens, top_k}).contiguous();
  dx.dtype(x.type()).shape({num_tokens, dim}).contiguous();
  dw.dtype(DType::kF32).shape({num_outputs, dim}).contiguous();
  dscale.dtype(DType::kF32).shape({1}).contiguous();
  RouterBwdParams params{};
  if (!dlogits_h.is_none()) {
    const Tensor dlogits = call.tensor(dlogits_h, "dlogits");
    dlogits.dtype(DType::kF32).shape({num_tokens, num_outputs}).contiguous();
    params.dlogits = dlogits.data<const float>();
  }
  call.workspace(workspace);
  params.x = x.data();
  params.weight = weight.data<const float>();
  params.expert_ids = ids.data<const std::int32_t>();
  params.logits = logits.data<const float>();
  params.dweights = dweights.data<const float>();
  params.dgammas = dgammas.data<const float>();
  params.dx = dx.data();
  params.dw = dw.data<float>();
  params.dscale = dscale.data<float>();
  params.x_row_stride = x.stride(0);
  params.num_tokens = num_tokens;
  params.in_dim = dim;
  params.num_experts = static_cast<std::int32_t>(num_experts);
  params.num_shared = static_cast<std::int32_t>(num_shared);
  params.top_k = static_cast<std::int32_t>(top_k);
  params.scale = scale;
  params.dtype = x.type();
  TML_RUN(call, router_bwd, params);
}

std::int64_t moe_bwd_workspace(std::int64_t num_tokens, std::int64_t hidden, std::int64_t width,
                               std::int32_t num_experts, std::int32_t num_shared,
                               std::int32_t top_k) {
  require_build("cuda_moe_bwd");
  MoeBwdParams params{};
  params.num_tokens = num_tokens;
  params.hidden = hidden;
  params.width = width;
  params.num_experts = num_experts;
  params.num_shared = num_shared;
  params.top_k = top_k;
  params.dx = params.dw13 = &params;  // all gradients: the most
  return TML_WORKSPACE(moe_bwd, params);
}

void moe_bwd(nb::handle dy_h, nb::handle x_h, nb::handle ids_h, nb::handle weights_h,
             nb::handle gammas_h, nb::handle gate_up_h, nb::handle w13_h, nb::handle w2_h,
             nb::handle dx_h, nb::handle dweights_h, nb::handle dgammas_h, nb::handle dw13_h,
             nb::handle dw2_h, nb::handle workspace) {
  Call call("cuda_moe_bwd");
  const Tensor dy = call.bf16(dy_h, "dy"), x = call.bf16(x_h, "x");
  const Tensor ids = call.tensor(ids_h, "expert_ids"), weights = call.tensor(weights_h, "weights");
  const Tensor gammas = call.tensor(gammas_h, "gammas"), gate_up = call.bf16(gate_up_h, "gate_up");
  const Tensor w13 = call.bf16(w13_h, "w13"), w2 = call.bf16(w2_h, "w2");
  const Tensor dx = call.bf16(dx_h, "dx_out"), dweights = call.tensor(dweights_h, "dweights_out");
  const Tensor dgammas = call.tensor(dgammas_h, "dgammas_out");
  dy.rank(2);
  check_rows16(dy);
  const std::int64_t num_tokens = dy.size(0), hidden = dy.size(1);
  x.shape({num_tokens, hidden}).rows_contiguous();
  w2.shape({kAny, hidden, kAny}).contiguous();
  const std::int64_t matrices = w2.size(0), width = w2.size(2);
  w13.shape({matrices, 2 * width, hidden}).contiguous();
  ids.dtype(DType::kI32).shape({num_tokens, kAny}).contiguous();
  gammas.dtype(DType::kF32).shape({num_tokens, kAny}).contiguous();
  const std::int64_t top_k = ids.size(1), num_shared = gammas.size(1);
  if (top_k < 1 || top_k > matrices - num_shared)
    ids.refuse("1 to " + std::to_string(matrices - num_shared) + " wide (top_k)",
               std::to_string(top_k));
  weights.dtype(DType::kF32).shape({num_tokens, top_k}).contiguous();
  gate_up.shape({num_tokens, top_k + num_shared, 2 * width}).contiguous();
  dx.shape({num_tokens, hidden}).contiguous();
  dweights.dtype(DType::kF32).shape({num_tokens, top_k}).contiguous();
  dgammas.dtype(DType::kF32).shape({num_tokens, num_shared}).contiguous();
  MoeBwdParams params{};
  if (dw13_h.is_none() != dw2_h.is_none())
    throw ArgumentError("cuda_moe_bwd: dw13_out and dw2_out go together, got one of them");
  if (!dw13_h.is_none()) {
    const Tensor dw13 = call.bf16(dw13_h, "dw13_out"), dw2 = call.bf16(dw2_h, "dw2_out");
    dw13.shape({matrices, 2 * width, hidden}).contiguous();
    dw2.shape({matrices, hidden, width}).contiguous();
    params.dw13 = dw13.data();
    params.dw2 = dw2.data();
  }
  call.workspace(workspace);
  params.dy = dy.data();
  params.x = x.data();
  params.expert_ids = ids.data<const std::int32_t>();
  params.weights = weights.data<const float>();
  params.gammas = gammas.data<const float>();
  params.gate_up = gate_up.data();
  params.w13 = w13.data();
  params.w2 = w2.data();
  params.dx = dx.data();
  params.dweights = dweights.data<float>();
  params.dgammas = dgammas.data<float>();
  params.dy_row_stride = dy.stride(0);
  params.x_row_stride = x.stride(0);
  params.num_tokens = num_tokens;
  params.hidden = hidden;
  params.width = width;
  params.num_experts = static_cast<std::int32_t>(matrices - num_shared);
  params.num_shared = static_cast<std::int32_t>(num_shared);
  params.top_k = static_cast<std::int32_t>(top_k);
  params.dtype = DType::kBf16;
  TML_RUN(call, moe_bwd, params);
}

}  // namespace

void bind_cuda_train(nb::module_& m) {
  m.def("cuda_rms_norm_bwd_workspace", &rms_norm_bwd_workspace, nb::arg("num_rows"),
        nb::arg("dim"));
  m.def("cuda_rms_norm_bwd", &rms_norm_bwd, nb::arg("dy"), nb::arg("x"), nb::arg("weight"),
        nb::arg("eps"), nb::arg("divisor"), nb::arg("use_gelu"), nb::arg("dx_out"),
        nb::arg("dweight_out"), nb::arg("workspace").none());
  m.def("cuda_embed_bwd_workspace", &embed_bwd_workspace, nb::arg("num_tokens"), nb::arg("dim"));
  m.def("cuda_embed_bwd", &embed_bwd, nb::arg("dy"), nb::arg("ids"), nb::arg("table"),
        nb::arg("weight"), nb::arg("eps"), nb::arg("dtable_out"), nb::arg("dweight_out"),
        nb::arg("workspace").none());
  m.def("cuda_dmel_embed_bwd_workspace", &dmel_embed_bwd_workspace, nb::arg("num_frames"),
        nb::arg("dim"));
  m.def("cuda_dmel_embed_bwd", &dmel_embed_bwd, nb::arg("dy"), nb::arg("bins"), nb::arg("table"),
        nb::arg("num_levels"), nb::arg("weight"), nb::arg("eps"), nb::arg("dtable_out"),
        nb::arg("dweight_out"), nb::arg("workspace").none());
  m.def("cuda_sconv_norm_packed_bwd_workspace", &sconv_norm_bwd_workspace, nb::arg("num_tokens"),
        nb::arg("dim"));
  m.def("cuda_sconv_norm_packed_bwd", &sconv_norm_bwd, nb::arg("dnormed").none(),
        nb::arg("dresidual"), nb::arg("x"), nb::arg("residual"), nb::arg("conv_weight"),
        nb::arg("norm_weight").none(), nb::arg("eps"), nb::arg("cu_tokens"), nb::arg("dx_out"),
        nb::arg("dresidual_out"), nb::arg("dconv_out"), nb::arg("dnorm_out").none(),
        nb::arg("workspace").none());
  m.def("cuda_linear_train_workspace", &linear_train_workspace, nb::arg("num_tokens"),
        nb::arg("in_dim"), nb::arg("out_dim"));
  m.def("cuda_linear_plain", &linear_plain, nb::arg("x"), nb::arg("w"), nb::arg("out"),
        nb::arg("workspace").none());
  m.def("cuda_linear_dgrad", &linear_dgrad, nb::arg("dy"), nb::arg("w"), nb::arg("dx_out"),
        nb::arg("workspace").none());
  m.def("cuda_linear_wgrad", &linear_wgrad, nb::arg("dy"), nb::arg("x"), nb::arg("dw_out"),
        nb::arg("workspace").none());
  m.def("cuda_linear_logp_workspace", &linear_logp_workspace, nb::arg("num_tokens"),
        nb::arg("in_dim"), nb::arg("vocab_size"), nb::arg("is_bwd"));
  m.def("cuda_linear_logp", &linear_logp, nb::arg("h"), nb::arg("weight"), nb::arg("vocab_size"),
        nb::arg("targets"), nb::arg("logprobs_out"), nb::arg("entropy_out").none(),
        nb::arg("workspace").none());
  m.def("cuda_linear_logp_bwd", &linear_logp_bwd, nb::arg("h"), nb::arg("weight"),
        nb::arg("plain_weight"), nb::arg("vocab_size"), nb::arg("targets"), nb::arg("d_logprobs"),
        nb::arg("d_entropy").none(), nb::arg("logprobs_out"), nb::arg("dh_out"), nb::arg("dw_out"),
        nb::arg("workspace").none());
  m.def("cuda_router_bwd_workspace", &router_bwd_workspace, nb::arg("num_tokens"),
        nb::arg("num_outputs"));
  m.def("cuda_router_bwd", &router_bwd, nb::arg("x"), nb::arg("weight"), nb::arg("expert_ids"),
        nb::arg("logits"), nb::arg("dweights"), nb::arg("dgammas"), nb::arg("dlogits").none(),
        nb::arg("scale"), nb::arg("dx_out"), nb::arg("dw_out"), nb::arg("dscale_out"),
        nb::arg("workspace").none());
  m.def("cuda_moe_bwd_workspace", &moe_bwd_workspace, nb::arg("num_tokens"), nb::arg("hidden"),
        nb::arg("width"), nb::arg("num_experts"), nb::arg("num_shared"), nb::arg("top_k"));
  m.def("cuda_moe_bwd", &moe_bwd, nb::arg("dy"), nb::arg("x"), nb::arg("expert_ids"),
        nb::arg("weights"), nb::arg("gammas"), nb::arg("gate_up"), nb::arg("w13"), nb::arg("w2"),
        nb::arg("dx_out"), nb::arg("dweights_out"), nb::arg("dgammas_out"),
        nb::arg("dw13_out").none(), nb::arg("dw2_out").none(), nb::arg("workspace").none());
}

}  // namespace tml
