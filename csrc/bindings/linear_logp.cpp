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
    if (target[t] != kIgnoredTarget && (target[t] < 0 || target[t] >= vocab_size))
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

void check_vocab(const Tensor& weight, std::int64_t vocab_size, std::int64_t num_rows) {
  if (vocab_size < 1 || vocab_size > num_rows)
    weight.refuse("at least vocab_size = " + std::to_string(vocab_size) + " >= 1 outputs",
                  std::to_string(num_rows));
}

void linear_logp(nb::handle h_h, nb::handle weight_h, std::int64_t vocab_size, nb::handle targets_h,
                 nb::handle logprobs_h, nb::handle lse_h, nb::handle entropy_h, int num_threads) {
  static constexpr const char* kOp = "linear_logp";
  const Tensor h(h_h, kOp, "h"), weight(weight_h, kOp, "weight"),
      targets(targets_h, kOp, "targets");
  h.floating().rank(2).rows_contiguous();
  weight.dtype(h.type()).contiguous().aligned(64);
  const std::int64_t steps = num_k_steps(h.type(), h.size(1)), num_tokens = h.size(0);
  if (h.type() == DType::kBf16)
    weight.shape({kAny, steps, contract::kPanel, 2});
  else
    weight.shape({kAny, steps, contract::kPanel});
  check_vocab(weight, vocab_size, weight.size(0) * contract::kPanel);
  LinearLogpParams params{};
  params.input = {h.data(),  weight.data(), h.stride(0), num_tokens,
                  h.size(1), vocab_size,    h.type()};
  params.targets = targets_arg(targets, num_tokens, vocab_size);
  params.logprobs = row_values(logprobs_h, kOp, "logprobs", num_tokens);
  params.lse = row_values(lse_h, kOp, "lse", num_tokens);
  params.entropy = row_values(entropy_h, kOp, "entropy", num_tokens);
  params.num_threads = num_threads;
  nb::gil_scoped_release release;
  cpu::linear_logp(params);
}

void linear_logp_bwd(nb::handle h_h, nb::handle weight_h, std::int64_t vocab_size,
                     nb::handle targets_h, nb::handle lse_h, nb::handle entropy_h,
                     nb::handle d_logprobs_h, nb::handle d_entropy_h, nb::handle dh_h,
                     nb::handle dw_h, int num_threads) {
  static constexpr const char* kOp = "linear_logp_bwd";
  const Tensor h(h_h, kOp, "h"), weight(weight_h, kOp, "weight"),
      targets(targets_h, kOp, "targets");
  const Tensor dh(dh_h, kOp, "dh"), dw(dw_h, kOp, "dw");
  h.floating().rank(2).rows_contiguous();
  const std::int64_t num_tokens = h.size(0), in_dim = h.size(1);
  weight.dtype(h.type()).shape({kAny, in_dim}).rows_contiguous();
  check_vocab(weight, vocab_size, weight.size(0));
  dh.dtype(h.type()).shape({num_tokens, in_dim}).contiguous();
  dw.dtype(h.type()).shape({weight.size(0), in_dim}).contiguous();
  LinearLogpBwdParams params{};
  params.h = h.data();
  params.weight = weight.data();
  params.h_row_stride = h.stride(0);
  params.weight_row_stride = weight.stride(0);
  params.num_tokens = num_tokens;
  params.in_dim = in_dim;
  params.num_rows = weight.size(0);
  params.vocab_size = vocab_size;
  params.targets = targets_arg(targets, num_tokens, vocab_size);
  params.lse = row_values(lse_h, kOp, "lse", num_tokens);
  params.entropy = row_values(entropy_h, kOp, "entropy", num_tokens);
  params.d_logprobs = row_values(d_logprobs_h, kOp, "d_logprobs", num_tokens);
  params.d_entropy = row_values(d_entropy_h, kOp, "d_entropy", num_tokens);
  if (params.d_entropy != nullptr && params.entropy == nullptr)
    throw ArgumentError("linear_logp_bwd: d_entropy needs entropy, got None");
  params.dh = dh.data();
  params.dw = dw.data();
  params.dtype = h.type();
  params.num_threads = num_threads;
  nb::gil_scoped_release release;
  cpu::linear_logp_bwd(params);
}

}  // namespace

void bind_linear_logp(nb::module_& m) {
  m.def("linear_logp", &linear_logp, nb::arg("h"), nb::arg("weight"), nb::arg("vocab_size"),
        nb::arg("targets"), nb::arg("logprobs"), nb::arg("lse"), nb::arg("entropy").none(),
        nb::arg("num_threads"));
  m.def("linear_logp_bwd", &linear_logp_bwd, nb::arg("h"), nb::arg("weight"), nb::arg("vocab_size"),
        nb::arg("targets"), nb::arg("lse"), nb::arg("entropy").none(), nb::arg("d_logprobs"),
        nb::arg("d_entropy").none(), nb::arg("dh"), nb::arg("dw"), nb::arg("num_threads"));
}

}  // namespace tml
