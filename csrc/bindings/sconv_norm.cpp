#include <nanobind/nanobind.h>

#include "bindings/module.h"
#include "bindings/step_batch.h"
#include "core/contract.h"
#include "cpu/cpu.h"

namespace tml {
namespace {

constexpr const char* kOp = "sconv_norm";

void sconv_norm(nb::handle x_h, nb::handle residual_h, nb::handle conv_weight_h,
                nb::handle norm_weight_h, float eps, nb::handle conv_rows_h,
                std::int64_t conv_layer, std::int64_t channel, nb::handle cu_tokens,
                nb::handle slots, nb::handle normed_h, int num_threads) {
  const Tensor x(x_h, kOp, "x"), residual(residual_h, kOp, "residual");
  const Tensor conv_weight(conv_weight_h, kOp, "conv_weight");
  const Tensor conv_rows(conv_rows_h, kOp, "conv_rows");
  x.floating().rank(2).rows_contiguous();
  const DType dtype = x.type();
  const std::int64_t num_tokens = x.size(0), dim = x.size(1);
  if (dim % contract::kLanes != 0)
    x.refuse("[T, H] with H a multiple of 16", "H = " + std::to_string(dim));
  residual.dtype(dtype).shape({num_tokens, dim}).rows_contiguous();
  conv_weight.dtype(DType::kF32).shape({dim, contract::kConvTaps}).contiguous();
  conv_rows.rank(4);
  const std::int64_t num_slots = conv_rows.size(0);
  SconvNormParams params{};
  if (norm_weight_h.is_none() != normed_h.is_none())
    throw ArgumentError("sconv_norm: out and norm_weight go together, got one of them");
  if (!norm_weight_h.is_none()) {
    const Tensor norm_weight(norm_weight_h, kOp, "norm_weight"), normed(normed_h, kOp, "out");
    norm_weight.dtype(dtype).shape({dim}).contiguous();
    normed.dtype(dtype).shape({num_tokens, dim}).rows_contiguous();
    params.norm_weight = norm_weight.data();
    params.normed = normed.data();
    params.normed_row_stride = normed.stride(0);
  }
  params.batch = batch_arg(kOp, cu_tokens, slots, nb::none(), nb::none(), num_tokens, num_slots);
  params.conv = conv_arg(kOp, conv_rows, conv_layer, channel, dim, num_slots, dtype);
  params.x = x.data();
  params.residual = residual.data();
  params.conv_weight = conv_weight.data<const float>();
  params.x_row_stride = x.stride(0);
  params.residual_row_stride = residual.stride(0);
  params.dim = dim;
  params.eps = eps;
  params.dtype = dtype;
  params.num_threads = num_threads;
  nb::gil_scoped_release release;
  cpu::sconv_norm(params);
}

}  // namespace

void bind_sconv_norm(nb::module_& m) {
  m.def("sconv_norm", &sconv_norm, nb::arg("x"), nb::arg("residual"), nb::arg("conv_weight"),
        nb::arg("norm_weight").none(), nb::arg("eps"), nb::arg("conv_rows"), nb::arg("conv_layer"),
        nb::arg("channel"), nb::arg("cu_tokens"), nb::arg("slots"), nb::arg("out").none(),
        nb::arg("num_threads"));
}

}  // namespace tml
