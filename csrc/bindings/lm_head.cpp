#include "ops/lm_head.h"

#include <nanobind/nanobind.h>

#include <cmath>
#include <string>

#include "bindings/module.h"
#include "bindings/tensor.h"
#include "core/contract.h"
#include "core/philox.h"
#include "cpu/cpu.h"

namespace tml {
namespace {

LmHeadInput input_of(const Tensor& h, const Tensor& weight, std::int64_t vocab_size) {
  h.floating().rank(2).rows_contiguous();
  weight.dtype(h.type()).contiguous().aligned(64);
  const std::int64_t steps = num_k_steps(h.type(), h.size(1));
  if (h.type() == DType::kBf16)
    weight.shape({kAny, steps, contract::kPanel, 2});
  else
    weight.shape({kAny, steps, contract::kPanel});
  if (vocab_size < 1 || vocab_size > weight.size(0) * contract::kPanel)
    weight.refuse("at least vocab_size = " + std::to_string(vocab_size) + " >= 1 outputs",
                  std::to_string(weight.size(0) * contract::kPanel));
  return {h.data(), weight.data(), h.stride(0), h.size(0), h.size(1), vocab_size, h.type()};
}

void lm_head_logprobs(nb::handle h_h, nb::handle weight_h, std::int64_t vocab_size,
                      nb::handle targets_h, nb::handle logprobs_h, int num_threads) {
  const Tensor h(h_h, "lm_head_logprobs", "h");
  const Tensor weight(weight_h, "lm_head_logprobs", "weight");
  const Tensor targets(targets_h, "lm_head_logprobs", "targets");
  const Tensor logprobs(logprobs_h, "lm_head_logprobs", "out");
  const LmHeadInput input = input_of(h, weight, vocab_size);
  targets.dtype(DType::kI64).shape({input.num_tokens}).contiguous();
  logprobs.dtype(DType::kF32).shape({input.num_tokens}).contiguous();
  const auto* target = targets.data<const std::int64_t>();
  for (std::int64_t t = 0; t < input.num_tokens; ++t)
    if (target[t] < 0 || target[t] >= vocab_size)
      targets.refuse("in [0, " + std::to_string(vocab_size) + ")", std::to_string(target[t]));
  const LmHeadLogprobsParams params{input, target, logprobs.data<float>(), num_threads};
  nb::gil_scoped_release release;
  cpu::lm_head_logprobs(params);
}

// Every row's value of `tensor` must satisfy `is_valid`.
template <class Value, class IsValid>
const Value* checked_rows(const Tensor& tensor, DType dtype, std::int64_t num_rows,
                          const char* expected, const IsValid& is_valid) {
  tensor.dtype(dtype).shape({num_rows}).contiguous();
  const auto* values = tensor.data<const Value>();
  for (std::int64_t row = 0; row < num_rows; ++row)
    if (!is_valid(values[row]))
      tensor.refuse(expected, std::to_string(values[row]) + " in row " + std::to_string(row));
  return values;
}

void lm_head_sample(nb::handle h_h, nb::handle weight_h, std::int64_t vocab_size,
                    nb::handle temperature_h, nb::handle top_k_h, nb::handle top_p_h,
                    nb::handle seed_h, nb::handle position_h, nb::handle allowed_h,
                    nb::handle tokens_h, nb::handle logprobs_h, int num_threads) {
  static constexpr const char* kOp = "lm_head_sample";
  const Tensor h(h_h, kOp, "h");
  const Tensor weight(weight_h, kOp, "weight");
  const Tensor tokens(tokens_h, kOp, "tokens");
  const Tensor logprobs(logprobs_h, kOp, "logprobs");
  LmHeadSampleParams params{};
  params.input = input_of(h, weight, vocab_size);
  const std::int64_t num_rows = params.input.num_tokens;
  params.temperature = checked_rows<float>(
      Tensor(temperature_h, kOp, "temperature"), DType::kF32, num_rows,
      "0 (greedy) or in [1e-6, inf)",
      [](float t) { return t == 0.0f || (t >= kMinTemperature && std::isfinite(t)); });
  params.top_k =
      checked_rows<std::int32_t>(Tensor(top_k_h, kOp, "top_k"), DType::kI32, num_rows,
                                 "0 (off) or positive", [](std::int32_t k) { return k >= 0; });
  params.top_p = checked_rows<float>(Tensor(top_p_h, kOp, "top_p"), DType::kF32, num_rows,
                                     "in (0, 1]", [](float p) { return p > 0.0f && p <= 1.0f; });
  const auto any = [](std::int64_t) { return true; };
  params.seed =
      checked_rows<std::int64_t>(Tensor(seed_h, kOp, "seed"), DType::kI64, num_rows, "", any);
  params.position = checked_rows<std::int64_t>(Tensor(position_h, kOp, "position"), DType::kI64,
                                               num_rows, "", any);
  if (!allowed_h.is_none()) {
    const Tensor allowed(allowed_h, kOp, "allowed");
    const std::int64_t words = ceil_div(vocab_size, 32);
    allowed.dtype(DType::kI32).shape({num_rows, words}).contiguous();
    params.allowed = allowed.data<const std::int32_t>();
    const std::uint32_t last_word = ~0u >> (words * 32 - vocab_size);
    for (std::int64_t row = 0; row < num_rows; ++row) {
      const std::int32_t* word = params.allowed + row * words;
      std::int64_t w = 0;
      while (w < words - 1 && word[w] == 0) ++w;
      if (w == words - 1 && (static_cast<std::uint32_t>(word[w]) & last_word) == 0)
        allowed.refuse("a mask with at least one bit set in each row",
                       "none in row " + std::to_string(row));
    }
  }
  tokens.dtype(DType::kI64).shape({num_rows}).contiguous();
  logprobs.dtype(DType::kF32).shape({num_rows}).contiguous();
  params.tokens = tokens.data<std::int64_t>();
  params.logprobs = logprobs.data<float>();
  params.num_threads = num_threads;
  nb::gil_scoped_release release;
  cpu::lm_head_sample(params);
}

// Known answers of the Random123 distribution (kat_vectors), checked by the compiler.
constexpr bool same(PhiloxCounter a, PhiloxCounter b) {
  return a.word[0] == b.word[0] && a.word[1] == b.word[1] && a.word[2] == b.word[2] &&
         a.word[3] == b.word[3];
}
static_assert(same(philox4x32({{0, 0, 0, 0}}, {{0, 0}}),
                   {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}));
static_assert(same(philox4x32({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
                              {{0xa4093822, 0x299f31d0}}),
                   {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}));

}  // namespace

void bind_lm_head(nb::module_& m) {
  m.def("lm_head_logprobs", &lm_head_logprobs, nb::arg("h"), nb::arg("weight"),
        nb::arg("vocab_size"), nb::arg("targets"), nb::arg("out"), nb::arg("num_threads"));
  m.def("lm_head_sample", &lm_head_sample, nb::arg("h"), nb::arg("weight"), nb::arg("vocab_size"),
        nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("seed"),
        nb::arg("position"), nb::arg("allowed").none(), nb::arg("tokens"), nb::arg("logprobs"),
        nb::arg("num_threads"));
}

}  // namespace tml
