#include "ops/moe.h"

#include <nanobind/nanobind.h>

#include "bindings/module.h"
#include "bindings/tensor.h"
#include "core/contract.h"
#include "cpu/cpu.h"
#include "ops/moe_bwd.h"

namespace tml {
namespace {

// A packed weight of `experts` matrices of `panels` panels over `in_dim` inputs.
void check_packed(const Tensor& weight, std::int64_t experts, std::int64_t panels,
                  std::int64_t in_dim, DType dtype) {
  weight.dtype(dtype).contiguous().aligned(64);
  const std::int64_t steps = num_k_steps(dtype, in_dim);
  if (dtype == DType::kBf16)
    weight.shape({experts, panels, steps, contract::kPanel, 2});
  else
    weight.shape({experts, panels, steps, contract::kPanel});
}

// [num_tokens, top_k] ids below num_experts, ascending in each row.
void check_ids(const Tensor& ids, std::int64_t num_experts) {
  const auto* id = ids.data<const std::int32_t>();
  const std::int64_t count = ids.numel(), top_k = ids.size(1);
  for (std::int64_t i = 0; i < count; ++i) {
    if (id[i] < 0 || id[i] >= num_experts)
      ids.refuse("in [0, " + std::to_string(num_experts) + ")", std::to_string(id[i]));
    if (i % top_k != 0 && id[i] <= id[i - 1])
      ids.refuse("ascending and distinct in each row",
                 std::to_string(id[i - 1]) + " before " + std::to_string(id[i]));
  }
}

void pack_experts(nb::handle gate_up_h, nb::handle down_h, nb::handle w13_h, nb::handle w2_h,
                  int num_threads) {
  const Tensor gate_up(gate_up_h, "pack_experts", "gate_up");
  const Tensor down(down_h, "pack_experts", "down");
  const Tensor w13(w13_h, "pack_experts", "w13");
  const Tensor w2(w2_h, "pack_experts", "w2");
  gate_up.floating().rank(3).contiguous();
  const DType dtype = gate_up.type();
  const std::int64_t count = gate_up.size(0), hidden = gate_up.size(2);
  const std::int64_t width = gate_up.size(1) / 2;
  if (gate_up.size(1) % 2 != 0) gate_up.refuse("[E, 2I, H]", "an odd second dimension");
  down.dtype(dtype).shape({count, hidden, width}).contiguous();
  check_packed(w13, count, ceil_div(width, 16), hidden, dtype);
  check_packed(w2, count, ceil_div(hidden, contract::kPanel), width, dtype);
  const PackExpertsParams params{gate_up.data(), down.data(), w13.data(), w2.data(),  count,
                                 hidden,         width,       dtype,      num_threads};
  nb::gil_scoped_release release;
  cpu::pack_experts(params);
}

void moe(nb::handle x_h, nb::handle ids_h, nb::handle weights_h, nb::handle gammas_h,
         nb::handle w13_h, nb::handle w2_h, std::int64_t width, nb::handle out_h,
         nb::handle gate_up_h, int num_threads) {
  const Tensor x(x_h, "moe", "x");
  const Tensor ids(ids_h, "moe", "expert_ids");
  const Tensor weights(weights_h, "moe", "weights");
  const Tensor gammas(gammas_h, "moe", "gammas");
  const Tensor w13(w13_h, "moe", "w13");
  const Tensor w2(w2_h, "moe", "w2");
  const Tensor out(out_h, "moe", "out");
  x.floating().rank(2).rows_contiguous();
  const std::int64_t num_tokens = x.size(0), hidden = x.size(1);
  out.dtype(x.type()).shape({num_tokens, hidden}).rows_contiguous();
  ids.dtype(DType::kI32).shape({num_tokens, kAny}).contiguous();
  const std::int64_t top_k = ids.size(1);
  weights.dtype(DType::kF32).shape({num_tokens, top_k}).contiguous();
  gammas.dtype(DType::kF32).shape({num_tokens, kAny}).contiguous();
  const std::int64_t num_shared = gammas.size(1);
  if (width <= 0) throw ArgumentError("moe: width must be positive");
  if (w13.ndim() == 0 || w13.size(0) < num_shared)
    w13.refuse("at least num_shared = " + std::to_string(num_shared) + " experts", "fewer");
  const std::int64_t experts = w13.size(0);
  check_packed(w13, experts, ceil_div(width, 16), hidden, x.type());
  check_packed(w2, experts, ceil_div(hidden, contract::kPanel), width, x.type());
  const std::int64_t num_experts = experts - num_shared;
  check_ids(ids, num_experts);
  MoeParams params{x.data(),
                   ids.data<const std::int32_t>(),
                   weights.data<const float>(),
                   gammas.data<const float>(),
                   w13.data(),
                   w2.data(),
                   out.data(),
                   nullptr,
                   x.stride(0),
                   out.stride(0),
                   num_tokens,
                   hidden,
                   width,
                   static_cast<std::int32_t>(num_experts),
                   static_cast<std::int32_t>(num_shared),
                   static_cast<std::int32_t>(top_k),
                   x.type(),
                   num_threads};
  if (!gate_up_h.is_none()) {
    const Tensor gate_up(gate_up_h, "moe", "gate_up");
    gate_up.dtype(x.type()).shape({num_tokens, top_k + num_shared, 2 * width}).contiguous();
    params.gate_up = gate_up.data();
  }
  nb::gil_scoped_release release;
  cpu::moe(params);
}

void moe_bwd(nb::handle dy_h, nb::handle x_h, nb::handle ids_h, nb::handle weights_h,
             nb::handle gammas_h, nb::handle gate_up_h, nb::handle w13_h, nb::handle w2_h,
             nb::handle dx_h, nb::handle dx_sum_h, nb::handle dweights_h, nb::handle dgammas_h,
             nb::handle dw13_h, nb::handle dw2_h, int num_threads) {
  const Tensor dy(dy_h, "moe_bwd", "dy");
  const Tensor x(x_h, "moe_bwd", "x");
  const Tensor ids(ids_h, "moe_bwd", "expert_ids");
  const Tensor weights(weights_h, "moe_bwd", "weights");
  const Tensor gammas(gammas_h, "moe_bwd", "gammas");
  const Tensor gate_up(gate_up_h, "moe_bwd", "gate_up");
  const Tensor w13(w13_h, "moe_bwd", "w13");
  const Tensor w2(w2_h, "moe_bwd", "w2");
  const Tensor dweights(dweights_h, "moe_bwd", "dweights");
  const Tensor dgammas(dgammas_h, "moe_bwd", "dgammas");
  x.floating().rank(2).rows_contiguous();
  const DType dtype = x.type();
  const std::int64_t num_tokens = x.size(0), hidden = x.size(1);
  dy.dtype(dtype).shape({num_tokens, hidden}).rows_contiguous();
  ids.dtype(DType::kI32).shape({num_tokens, kAny}).contiguous();
  const std::int64_t top_k = ids.size(1);
  weights.dtype(DType::kF32).shape({num_tokens, top_k}).contiguous();
  gammas.dtype(DType::kF32).shape({num_tokens, kAny}).contiguous();
  const std::int64_t num_shared = gammas.size(1);
  w13.dtype(dtype).shape({kAny, kAny, hidden}).contiguous();
  const std::int64_t experts = w13.size(0), width = w13.size(1) / 2;
  if (w13.size(1) % 2 != 0 || experts < num_shared)
    w13.refuse("[E + " + std::to_string(num_shared) + ", 2I, H]", "another shape");
  w2.dtype(dtype).shape({experts, hidden, width}).contiguous();
  gate_up.dtype(dtype).shape({num_tokens, top_k + num_shared, 2 * width}).contiguous();
  dweights.dtype(DType::kF32).shape({num_tokens, top_k}).contiguous();
  dgammas.dtype(DType::kF32).shape({num_tokens, num_shared}).contiguous();
  check_ids(ids, experts - num_shared);
  MoeBwdParams params{dy.data(),
                      x.data(),
                      ids.data<const std::int32_t>(),
                      weights.data<const float>(),
                      gammas.data<const float>(),
                      gate_up.data(),
                      w13.data(),
                      w2.data(),
                      nullptr,
                      nullptr,
                      dweights.data<float>(),
                      dgammas.data<float>(),
                      nullptr,
                      nullptr,
                      dy.stride(0),
                      x.stride(0),
                      num_tokens,
                      hidden,
                      width,
                      static_cast<std::int32_t>(experts - num_shared),
                      static_cast<std::int32_t>(num_shared),
                      static_cast<std::int32_t>(top_k),
                      dtype,
                      num_threads};
  if (!dx_h.is_none()) {
    const Tensor dx(dx_h, "moe_bwd", "dx"), dx_sum(dx_sum_h, "moe_bwd", "dx_sum");
    dx.dtype(dtype).shape({num_tokens, hidden}).contiguous();
    dx_sum.dtype(DType::kF32).shape({num_tokens, hidden}).contiguous();
    params.dx = dx.data();
    params.dx_sum = dx_sum.data<float>();
  }
  if (!dw13_h.is_none()) {
    const Tensor dw13(dw13_h, "moe_bwd", "dw13"), dw2(dw2_h, "moe_bwd", "dw2");
    dw13.dtype(dtype).shape({experts, 2 * width, hidden}).contiguous();
    dw2.dtype(dtype).shape({experts, hidden, width}).contiguous();
    params.dw13 = dw13.data();
    params.dw2 = dw2.data();
  }
  nb::gil_scoped_release release;
  cpu::moe_bwd(params);
}

}  // namespace

void bind_moe(nb::module_& m) {
  m.def("pack_experts", &pack_experts, nb::arg("gate_up"), nb::arg("down"), nb::arg("w13"),
        nb::arg("w2"), nb::arg("num_threads"));
  m.def("moe", &moe, nb::arg("x"), nb::arg("expert_ids"), nb::arg("weights"), nb::arg("gammas"),
        nb::arg("w13"), nb::arg("w2"), nb::arg("width"), nb::arg("out"), nb::arg("gate_up").none(),
        nb::arg("num_threads"));
  m.def("moe_bwd", &moe_bwd, nb::arg("dy"), nb::arg("x"), nb::arg("expert_ids"), nb::arg("weights"),
        nb::arg("gammas"), nb::arg("gate_up"), nb::arg("w13"), nb::arg("w2"), nb::arg("dx").none(),
        nb::arg("dx_sum").none(), nb::arg("dweights"), nb::arg("dgammas"), nb::arg("dw13").none(),
        nb::arg("dw2").none(), nb::arg("num_threads"));
}

}  // namespace tml
