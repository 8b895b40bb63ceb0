#include <nanobind/nanobind.h>

#include "bindings/module.h"
#include "bindings/step_batch.h"
#include "core/contract.h"
#include "cpu/cpu.h"

namespace tml {
namespace {

constexpr std::int64_t kTaps = contract::kConvTaps;

void sconv_norm_bwd(nb::handle dnormed_h, nb::handle dsum_h, nb::handle x_h, nb::handle sum_h,
                    nb::handle conv_weight_h, nb::handle norm_weight_h, float eps,
                    nb::handle cu_tokens, nb::handle dx_h, nb::handle dresidual_h,
                    nb::handle dconv_h, nb::handle dnorm_h, int num_threads) {
  constexpr const char* kOp = "sconv_norm_packed_bwd";
  const Tensor dsum(dsum_h, kOp, "dresidual"), x(x_h, kOp, "x"), sum(sum_h, kOp, "residual");
  const Tensor conv_weight(conv_weight_h, kOp, "conv_weight");
  const Tensor dx(dx_h, kOp, "dx_out"), dresidual(dresidual_h, kOp, "dresidual_out");
  const Tensor dconv(dconv_h, kOp, "dconv_out");
  x.floating().rank(2).rows_contiguous();
  const DType dtype = x.type();
  const std::int64_t num_tokens = x.size(0), dim = x.size(1);
  if (dim % contract::kLanes != 0)
    x.refuse("[T, H] with H a multiple of 16", "H = " + std::to_string(dim));
  dsum.dtype(dtype).shape({num_tokens, dim}).rows_contiguous();
  sum.dtype(dtype).shape({num_tokens, dim}).rows_contiguous();
  conv_weight.dtype(DType::kF32).shape({dim, kTaps}).contiguous();
  dx.dtype(dtype).shape({num_tokens, dim}).contiguous();
  dresidual.dtype(dtype).shape({num_tokens, dim}).contiguous();
  dconv.dtype(DType::kF32).shape({dim, kTaps}).contiguous();
  SconvNormBwdParams params{};
  if (norm_weight_h.is_none() != dnormed_h.is_none() || dnormed_h.is_none() != dnorm_h.is_none())
    throw ArgumentError(std::string(kOp) +
                        ": dnormed, norm_weight and dnorm_out go together, got some of them");
  if (!norm_weight_h.is_none()) {
    const Tensor dnormed(dnormed_h, kOp, "dnormed"), norm_weight(norm_weight_h, kOp, "norm_weight");
    const Tensor dnorm(dnorm_h, kOp, "dnorm_out");
    dnormed.dtype(dtype).shape({num_tokens, dim}).rows_contiguous();
    norm_weight.dtype(dtype).shape({dim}).contiguous();
    dnorm.dtype(dtype).shape({dim}).contiguous();
    params.dnormed = dnormed.data();
    params.dnormed_row_stride = dnormed.stride(0);
    params.norm_weight = norm_weight.data();
    params.dnorm = dnorm.data();
  }
  const StepBatch batch = packed_arg(kOp, cu_tokens, num_tokens);
  params.dsum = dsum.data();
  params.x = x.data();
  params.sum = sum.data();
  params.conv_weight = conv_weight.data<const float>();
  params.cu_tokens = batch.cu_tokens;
  params.dx = dx.data();
  params.dresidual = dresidual.data();
  params.dconv = dconv.data<float>();
  params.dsum_row_stride = dsum.stride(0);
  params.x_row_stride = x.stride(0);
  params.sum_row_stride = sum.stride(0);
  params.num_seqs = batch.num_seqs;
  params.num_tokens = num_tokens;
  params.dim = dim;
  params.eps = eps;
  params.dtype = dtype;
  params.num_threads = num_threads;
  nb::gil_scoped_release release;
  cpu::sconv_norm_bwd(params);
}

// The inputs of both directions, checked against each other; q is q or dq, r is r or dr.
PackedPrologue packed_prologue(const char* op, nb::handle qkvr_h, nb::handle k_conv_h,
                               nb::handle v_conv_h, nb::handle q_norm_h, nb::handle k_norm_h,
                               float eps, float log_floor, float log_alpha, nb::handle cu_tokens,
                               const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& r,
                               int num_threads) {
  const Tensor qkvr(qkvr_h, op, "qkvr"), k_conv(k_conv_h, op, "k_conv");
  const Tensor v_conv(v_conv_h, op, "v_conv");
  const Tensor q_norm(q_norm_h, op, "q_norm"), k_norm(k_norm_h, op, "k_norm");
  qkvr.floating().rank(2).rows_contiguous();
  const DType dtype = qkvr.type();
  const std::int64_t num_tokens = qkvr.size(0);
  q_norm.dtype(dtype).rank(1).contiguous();
  const std::int64_t dim = q_norm.size(0);
  if (dim == 0 || dim % contract::kLanes != 0)
    q_norm.refuse("[D] with D a multiple of 16", "D = " + std::to_string(dim));
  k_norm.dtype(dtype).shape({dim}).contiguous();
  k_conv.dtype(DType::kF32).shape({kAny, kTaps}).contiguous();
  const std::int64_t channels = k_conv.size(0);
  if (channels % dim != 0)
    k_conv.refuse("[C, 4] with C a multiple of " + std::to_string(dim),
                  "C = " + std::to_string(channels));
  v_conv.dtype(DType::kF32).shape({channels, kTaps}).contiguous();
  q.dtype(dtype).shape({num_tokens, kAny, dim}).contiguous();
  const std::int64_t num_heads = q.size(1);
  k.dtype(dtype).shape({num_tokens, channels / dim, dim}).contiguous();
  v.dtype(dtype).shape({num_tokens, channels / dim, dim}).contiguous();
  r.dtype(dtype).shape({num_tokens, num_heads, kAny}).contiguous();
  qkvr.shape({num_tokens, num_heads * (dim + r.size(2)) + 2 * channels});
  if (!(log_floor >= 0.0f))
    throw ArgumentError(std::string(op) + ": log_floor must be >= 0 (0: no log scaling), got " +
                        std::to_string(log_floor));
  const StepBatch batch = packed_arg(op, cu_tokens, num_tokens);
  return {qkvr.data(),
          k_conv.data<const float>(),
          v_conv.data<const float>(),
          q_norm.data(),
          k_norm.data(),
          batch.cu_tokens,
          qkvr.stride(0),
          batch.num_seqs,
          num_tokens,
          num_heads,
          channels / dim,
          dim,
          r.size(2),
          eps,
          log_floor,
          log_alpha,
          dtype,
          num_threads};
}

void attn_prologue_packed(nb::handle qkvr, nb::handle k_conv, nb::handle v_conv, nb::handle q_norm,
                          nb::handle k_norm, float eps, float log_floor, float log_alpha,
                          nb::handle cu_tokens, nb::handle q_h, nb::handle k_h, nb::handle v_h,
                          nb::handle r_h, int num_threads) {
  constexpr const char* kOp = "attn_prologue_packed";
  const Tensor q(q_h, kOp, "q_out"), k(k_h, kOp, "k_out"), v(v_h, kOp, "v_out");
  const Tensor r(r_h, kOp, "r_out");
  const AttnProloguePackedParams params{
      packed_prologue(kOp, qkvr, k_conv, v_conv, q_norm, k_norm, eps, log_floor, log_alpha,
                      cu_tokens, q, k, v, r, num_threads),
      q.data(), k.data(), v.data(), r.data()};
  nb::gil_scoped_release release;
  cpu::attn_prologue_packed(params);
}

void attn_prologue_packed_bwd(nb::handle dq_h, nb::handle dk_h, nb::handle dv_h, nb::handle dr_h,
                              nb::handle qkvr_h, nb::handle k_conv, nb::handle v_conv,
                              nb::handle q_norm_h, nb::handle k_norm, float eps, float log_floor,
                              float log_alpha, nb::handle cu_tokens, nb::handle dqkvr_h,
                              nb::handle dk_conv_h, nb::handle dv_conv_h, nb::handle dq_norm_h,
                              nb::handle dk_norm_h, int num_threads) {
  constexpr const char* kOp = "attn_prologue_packed_bwd";
  const Tensor dq(dq_h, kOp, "dq"), dk(dk_h, kOp, "dk"), dv(dv_h, kOp, "dv"), dr(dr_h, kOp, "dr");
  const PackedPrologue in =
      packed_prologue(kOp, qkvr_h, k_conv, v_conv, q_norm_h, k_norm, eps, log_floor, log_alpha,
                      cu_tokens, dq, dk, dv, dr, num_threads);
  const Tensor dqkvr(dqkvr_h, kOp, "dqkvr_out");
  const Tensor dk_conv(dk_conv_h, kOp, "dk_conv_out"), dv_conv(dv_conv_h, kOp, "dv_conv_out");
  const Tensor dq_norm(dq_norm_h, kOp, "dq_norm_out"), dk_norm(dk_norm_h, kOp, "dk_norm_out");
  const std::int64_t channels = in.num_kv_heads * in.head_dim;
  const std::int64_t width = in.num_heads * (in.head_dim + in.d_rel) + 2 * channels;
  dqkvr.dtype(in.dtype).shape({in.num_tokens, width}).contiguous();
  dk_conv.dtype(DType::kF32).shape({channels, kTaps}).contiguous();
  dv_conv.dtype(DType::kF32).shape({channels, kTaps}).contiguous();
  dq_norm.dtype(in.dtype).shape({in.head_dim}).contiguous();
  dk_norm.dtype(in.dtype).shape({in.head_dim}).contiguous();
  const AttnProloguePackedBwdParams params{in,
                                           dq.data(),
                                           dk.data(),
                                           dv.data(),
                                           dr.data(),
                                           dqkvr.data(),
                                           dk_conv.data<float>(),
                                           dv_conv.data<float>(),
                                           dq_norm.data(),
                                           dk_norm.data()};
  nb::gil_scoped_release release;
  cpu::attn_prologue_packed_bwd(params);
}

}  // namespace

void bind_conv_train(nb::module_& m) {
  m.def("sconv_norm_bwd", &sconv_norm_bwd, nb::arg("dnormed").none(), nb::arg("dresidual"),
        nb::arg("x"), nb::arg("residual"), nb::arg("conv_weight"), nb::arg("norm_weight").none(),
        nb::arg("eps"), nb::arg("cu_tokens"), nb::arg("dx_out"), nb::arg("dresidual_out"),
        nb::arg("dconv_out"), nb::arg("dnorm_out").none(), nb::arg("num_threads"));
  m.def("attn_prologue_packed", &attn_prologue_packed, nb::arg("qkvr"), nb::arg("k_conv"),
        nb::arg("v_conv"), nb::arg("q_norm"), nb::arg("k_norm"), nb::arg("eps"),
        nb::arg("log_floor"), nb::arg("log_alpha"), nb::arg("cu_tokens"), nb::arg("q_out"),
        nb::arg("k_out"), nb::arg("v_out"), nb::arg("r_out"), nb::arg("num_threads"));
  m.def("attn_prologue_packed_bwd", &attn_prologue_packed_bwd, nb::arg("dq"), nb::arg("dk"),
        nb::arg("dv"), nb::arg("dr"), nb::arg("qkvr"), nb::arg("k_conv"), nb::arg("v_conv"),
        nb::arg("q_norm"), nb::arg("k_norm"), nb::arg("eps"), nb::arg("log_floor"),
        nb::arg("log_alpha"), nb::arg("cu_tokens"), nb::arg("dqkvr_out"), nb::arg("dk_conv_out"),
        nb::arg("dv_conv_out"), nb::arg("dq_norm_out"), nb::arg("dk_norm_out"),
        nb::arg("num_threads"));
}

}  // namespace tml
