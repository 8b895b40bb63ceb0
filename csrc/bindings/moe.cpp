#include "ops/moe.h"

#include <nanobind/nanobind.h>

#include "bindings/module.h"
#include "bindings/tensor.h"
#include "core/contract.h"
#include "cpu/cpu.h"

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

void moe(nb::handle x_h, nb::handle ids_h, nb::handle weights_h, nb::handle gammas_h,
         nb::handle w13_h, nb::handle w2_h, std::int64_t width, nb::handle out_h,
         int num_threads) {
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
  const auto* id = ids.data<const std::int32_t>();
  for (std::int64_t i = 0; i < num_tokens * top_k; ++i) {
    if (id[i] < 0 || id[i] >= num_experts)
      ids.refuse("in [0, " + std::to_string(num_experts) + ")", std::to_string(id[i]));
    if (i % top_k != 0 && id[i] <= id[i - 1])
      ids.refuse("ascending and distinct in each row",
                 std::to_string(id[i - 1]) + " before " + std::to_string(id[i]));
  }
  const MoeParams params{x.data(),
                         id,
                         weights.data<const float>(),
                         gammas.data<const float>(),
                         w13.data(),
                         w2.data(),
                         out.data(),
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
  nb::gil_scoped_release release;
  cpu::moe(params);
}

}  // namespace

void bind_moe(nb::module_& m) {
  m.def("moe", &moe, nb::arg("x"), nb::arg("expert_ids"), nb::arg("weights"), nb::arg("gammas"),
        nb::arg("w13"), nb::arg("w2"), nb::arg("width"), nb::arg("out"), nb::arg("num_threads"));
}

}  // namespace tml
