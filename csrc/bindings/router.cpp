#include "ops/router.h"

#include <nanobind/nanobind.h>

#include <algorithm>
#include <string>

#include "bindings/module.h"
#include "bindings/tensor.h"
#include "core/contract.h"
#include "cpu/cpu.h"
#include "ops/router_bwd.h"

namespace tml {
namespace {

void router(nb::handle x_h, nb::handle weight_h, nb::handle bias_h, nb::handle expert_ids_h,
            nb::handle weights_h, nb::handle gammas_h, nb::handle logits_h, float scale,
            int num_threads) {
  const Tensor x(x_h, "router", "x");
  const Tensor weight(weight_h, "router", "weight");
  const Tensor bias(bias_h, "router", "bias");
  const Tensor expert_ids(expert_ids_h, "router", "expert_ids");
  const Tensor weights(weights_h, "router", "weights");
  const Tensor gammas(gammas_h, "router", "gammas");
  x.floating().rank(2).rows_contiguous();
  const std::int64_t num_tokens = x.size(0);
  weight.dtype(DType::kF32).contiguous().aligned(64).shape({kAny, x.size(1), contract::kPanel});
  bias.dtype(DType::kF32).rank(1).contiguous();
  expert_ids.dtype(DType::kI32).shape({num_tokens, kAny}).contiguous();
  const std::int64_t num_experts = bias.size(0), top_k = expert_ids.size(1);
  weights.dtype(DType::kF32).shape({num_tokens, top_k}).contiguous();
  gammas.dtype(DType::kF32).shape({num_tokens, kAny}).contiguous();
  const std::int64_t num_outputs = num_experts + gammas.size(1);
  if (top_k < 1 || top_k > kRouterMaxTopK || top_k > num_experts)
    expert_ids.refuse("1 to " +
                          std::to_string(std::min<std::int64_t>(kRouterMaxTopK, num_experts)) +
                          " wide (top_k)",
                      std::to_string(top_k));
  if (num_outputs > kRouterMaxOutputs)
    throw ArgumentError("router: experts + shared must be at most " +
                        std::to_string(kRouterMaxOutputs) + ", got " + std::to_string(num_outputs));
  if (ceil_div(num_outputs, contract::kPanel) != weight.size(0))
    weight.refuse(
        std::to_string(ceil_div(num_outputs, contract::kPanel)) + " panels (experts + shared)",
        std::to_string(weight.size(0)));
  RouterParams params{x.data(),
                      weight.data(),
                      bias.data<float>(),
                      expert_ids.data<std::int32_t>(),
                      weights.data<float>(),
                      gammas.data<float>(),
                      nullptr,
                      x.stride(0),
                      num_tokens,
                      x.size(1),
                      static_cast<std::int32_t>(num_experts),
                      static_cast<std::int32_t>(gammas.size(1)),
                      static_cast<std::int32_t>(top_k),
                      scale,
                      x.type(),
                      num_threads};
  if (!logits_h.is_none()) {
    const Tensor logits(logits_h, "router", "logits");
    logits.dtype(DType::kF32).shape({num_tokens, num_outputs}).contiguous();
    params.logits = logits.data<float>();
  }
  nb::gil_scoped_release release;
  cpu::router(params);
}

void router_bwd(nb::handle x_h, nb::handle weight_h, nb::handle expert_ids_h, nb::handle logits_h,
                nb::handle dweights_h, nb::handle dgammas_h, nb::handle dlogits_h, nb::handle dx_h,
                nb::handle dw_h, nb::handle dscale_h, float scale, int num_threads) {
  const Tensor x(x_h, "router_bwd", "x");
  const Tensor weight(weight_h, "router_bwd", "weight");
  const Tensor expert_ids(expert_ids_h, "router_bwd", "expert_ids");
  const Tensor logits(logits_h, "router_bwd", "logits");
  const Tensor dweights(dweights_h, "router_bwd", "dweights");
  const Tensor dgammas(dgammas_h, "router_bwd", "dgammas");
  const Tensor dx(dx_h, "router_bwd", "dx");
  const Tensor dw(dw_h, "router_bwd", "dw");
  const Tensor dscale(dscale_h, "router_bwd", "dscale");
  x.floating().rank(2).rows_contiguous();
  const std::int64_t num_tokens = x.size(0), in_dim = x.size(1);
  weight.dtype(DType::kF32).shape({kAny, in_dim}).contiguous();
  const std::int64_t num_outputs = weight.size(0);
  expert_ids.dtype(DType::kI32).shape({num_tokens, kAny}).contiguous();
  logits.dtype(DType::kF32).shape({num_tokens, num_outputs}).contiguous();
  const std::int64_t top_k = expert_ids.size(1);
  dweights.dtype(DType::kF32).shape({num_tokens, top_k}).contiguous();
  dgammas.dtype(DType::kF32).shape({num_tokens, kAny}).contiguous();
  const std::int64_t num_experts = num_outputs - dgammas.size(1);
  if (num_experts < 0 || top_k > num_experts || top_k > kRouterMaxTopK ||
      num_outputs > kRouterMaxOutputs)
    throw ArgumentError("router_bwd: " + std::to_string(top_k) + " of " +
                        std::to_string(num_experts) + " experts and " +
                        std::to_string(dgammas.size(1)) + " shared is no routing of router");
  const auto* ids = expert_ids.data<const std::int32_t>();
  for (std::int64_t i = 0; i < num_tokens * top_k; ++i)
    if (ids[i] < 0 || ids[i] >= num_experts)
      expert_ids.refuse("in [0, " + std::to_string(num_experts) + ")", std::to_string(ids[i]));
  dx.dtype(x.type()).shape({num_tokens, in_dim}).contiguous();
  dw.dtype(DType::kF32).shape({num_outputs, in_dim}).contiguous();
  dscale.dtype(DType::kF32).shape({1});
  RouterBwdParams params{x.data(),
                         weight.data<const float>(),
                         ids,
                         logits.data<const float>(),
                         dweights.data<const float>(),
                         dgammas.data<const float>(),
                         nullptr,
                         dx.data(),
                         dw.data<float>(),
                         dscale.data<float>(),
                         x.stride(0),
                         num_tokens,
                         in_dim,
                         static_cast<std::int32_t>(num_experts),
                         static_cast<std::int32_t>(dgammas.size(1)),
                         static_cast<std::int32_t>(top_k),
                         scale,
                         x.type(),
                         num_threads};
  if (!dlogits_h.is_none()) {
    const Tensor dlogits(dlogits_h, "router_bwd", "dlogits");
    dlogits.dtype(DType::kF32).shape({num_tokens, num_outputs}).contiguous();
    params.dlogits = dlogits.data<const float>();
  }
  nb::gil_scoped_release release;
  cpu::router_bwd(params);
}

}  // namespace

void bind_router(nb::module_& m) {
  m.def("router", &router, nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("expert_ids"),
        nb::arg("weights"), nb::arg("gammas"), nb::arg("logits").none(), nb::arg("scale"),
        nb::arg("num_threads"));
  m.def("router_bwd", &router_bwd, nb::arg("x"), nb::arg("weight"), nb::arg("expert_ids"),
        nb::arg("logits"), nb::arg("dweights"), nb::arg("dgammas"), nb::arg("dlogits").none(),
        nb::arg("dx"), nb::arg("dw"), nb::arg("dscale"), nb::arg("scale"), nb::arg("num_threads"));
}

}  // namespace tml
