#include "ops/linear_logp.h"

#include <nanobind/nanobind.h>

#include <string>

#include "bindings/module.h"
#include "bindings/tensor.h"
#include "core/contract.h"
#include "cpu/cpu.h"

namespace tml {
namespace {

const std::int64_t* targets_arg(const Tensor& targets, std::int64_t num_tokens,
                                std::int64_t vocab_size) {
  targets.dtype(DType::kI64).shape({num_tokens}).contiguous();
  const auto* target = targets.data<const std::int64_t>();
  for (std::int64_t t = 0; t < num_tokens; ++t)
    if (target[t] < 0 || target[t] >= vocab_size)
      targets.refuse("in [0, " + std::to_string(vocab_size) + ") or -100 (ignored)",
                     std::to_string(target[t]));
  return target;
}

float* row_values(nb::handle handle, const char* op, const char* name, std::int64_t num_tokens) {
  if (handle.is_none()) return nullptr;
  const Tensor tensor(handle, op, name);
  tensor.dtype(DType::kF32).shape({num_tokens}).contiguous();
  return tensor.data<float>();
}

// h and a weight packed by pack_weight.
LmHeadInput input_args(const Tensor& h, const Tensor& packed, std::int64_t vocab_size) {
  h.floating().rank(2).rows_contiguous();
  packed.dtype(h.type()).contiguous().aligned(64);
  const std::int64_t steps = num_k_steps(h.type(), h.size(1));
  if (h.type() == DType::kBf16)
    packed.shape({kAny, steps, contract::kPanel, 2});
  else
    packed.shape({kAny, steps, contract::kPanel});
  const std::int64_t num_rows = packed.size(0) * contract::kPanel;
  if (vocab_size < 1 || vocab_size > num_rows)
    packed.refuse("at least vocab_size = " + std::to_string(vocab_size) + " >= 1 outputs",
                  std::to_string(num_rows));
  return {h.data(), packed.data(), h.stride(0), h.size(0), h.size(1), vocab_size, h.type()};
}

void linear_logp(nb::handle h_h, nb::handle packed_h, std::int64_t vocab_size, nb::handle targets_h,
                 nb::handle logprobs_h, nb::handle entropy_h, int num_threads) {
  static constexpr const char* kOp = "linear_logp";
  const Tensor h(h_h, kOp, "h"), packed(packed_h, kOp, "packed"),
      targets(targets_h, kOp, "targets");
  LinearLogpParams params{};
  params.input = input_args(h, packed, vocab_size);
  params.targets = targets_arg(targets, h.size(0), vocab_size);
  params.logprobs = row_values(logprobs_h, kOp, "logprobs", h.size(0));
  params.entropy = row_values(entropy_h, kOp, "entropy", h.size(0));
  params.num_threads = num_threads;
  nb::gil_scoped_release release;
  cpu::linear_logp(params);
}

void linear_logp_bwd(nb::handle h_h, nb::handle packed_h, nb::handle weight_h,
                     std::int64_t vocab_size, nb::handle targets_h, nb::handle d_logprobs_h,
                     nb::handle d_entropy_h, nb::handle logprobs_h, nb::handle dh_h,
                     nb::handle dw_h, int num_threads) {
  static constexpr const char* kOp = "linear_logp_bwd";
  const Tensor h(h_h, kOp, "h"), packed(packed_h, kOp, "packed"), weight(weight_h, kOp, "weight"),
      targets(targets_h, kOp, "targets"), dh(dh_h, kOp, "dh"), dw(dw_h, kOp, "dw");
  LinearLogpBwdParams params{};
  params.input = input_args(h, packed, vocab_size);
  const std::int64_t num_tokens = h.size(0), in_dim = h.size(1);
  weight.dtype(h.type()).shape({kAny, in_dim}).rows_contiguous();
  if (weight.size(0) < vocab_size)
    weight.refuse("at least vocab_size = " + std::to_string(vocab_size) + " rows",
                  std::to_string(weight.size(0)));
  dh.dtype(h.type()).shape({num_tokens, in_dim}).contiguous();
  dw.dtype(h.type()).shape({weight.size(0), in_dim}).contiguous();
  params.weight = weight.data();
  params.weight_row_stride = weight.stride(0);
  params.num_rows = weight.size(0);
  params.targets = targets_arg(targets, num_tokens, vocab_size);
  params.d_logprobs = row_values(d_logprobs_h, kOp, "d_logprobs", num_tokens);
  params.d_entropy = row_values(d_entropy_h, kOp, "d_entropy", num_tokens);
  params.logprobs = row_values(logprobs_h, kOp, "logprobs", num_tokens);
  params.dh = dh.data();
  params.dw = dw.data();
  params.num_threads = num_threads;
  nb::gil_scoped_release release;
  cpu::linear_logp_bwd(params);
}

}  // namespace

void bind_linear_logp(nb::module_& m) {
  m.def("linear_logp", &linear_logp, nb::arg("h"), nb::arg("packed"), nb::arg("vocab_size"),
        nb::arg("targets"), nb::arg("logprobs"), nb::arg("entropy").none(), nb::arg("num_threads"));
  m.def("linear_logp_bwd", &linear_logp_bwd, nb::arg("h"), nb::arg("packed"), nb::arg("weight"),
        nb::arg("vocab_size"), nb::arg("targets"), nb::arg("d_logprobs"),
        nb::arg("d_entropy").none(), nb::arg("logprobs"), nb::arg("dh"), nb::arg("dw"),
        nb::arg("num_threads"));
}

}  // namespace tml
