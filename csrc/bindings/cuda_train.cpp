// The gradients of the device ops. As in cuda.cpp, what only values could tell (ids, bins, the
// bounds of sequences) is the caller's to check.
#include <nanobind/nanobind.h>

#include "bindings/cuda_call.h"
#include "bindings/module.h"
#include "core/contract.h"
#include "ops/embed_bwd.h"
#include "ops/rms_norm_bwd.h"
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
}

}  // namespace tml
