// router and lm_head of the device, run on the host, against the CPU kernels.
#include <algorithm>

#include "core/tensor_core.h"
#include "cpu/cpu.h"
#include "tests/cuda_kit.h"

namespace tml::tests {
namespace {

TML_TEST(cuda_router_is_the_op) {
  const std::int64_t tokens = 11, dim = 140;
  const std::int32_t experts = 70, shared = 2, top_k = 6, outputs = experts + shared;
  auto x = random_bf16(static_cast<std::size_t>(tokens * dim), 1);
  std::fill(x.begin() + 3 * dim, x.begin() + 4 * dim, std::uint16_t{0});  // all scores tie
  auto weight = random_f32(static_cast<std::size_t>(outputs * dim), 2, 0.1f);
  auto bias = random_f32(static_cast<std::size_t>(experts), 3, 0.05f);
  bias[7] = bias[9] = __builtin_nanf("");
  std::vector<float> packed(static_cast<std::size_t>(ceil_div(outputs, 32) * 32 * dim));
  cpu::pack_weight({weight.data(), packed.data(), dim, outputs, dim, DType::kF32, 1});
  struct Out {
    std::vector<std::int32_t> ids;
    std::vector<float> weights, gammas, logits;
  } ours, theirs;
  for (Out* out : {&ours, &theirs}) {
    out->ids.assign(static_cast<std::size_t>(tokens * top_k), -1);
    out->weights.assign(out->ids.size(), -1.0f);
    out->gammas.assign(static_cast<std::size_t>(tokens * shared), -1.0f);
    out->logits.assign(static_cast<std::size_t>(tokens * outputs), -1.0f);
    RouterParams p{x.data(),
                   out == &ours ? weight.data() : packed.data(),
                   bias.data(),
                   out->ids.data(),
                   out->weights.data(),
                   out->gammas.data(),
                   out->logits.data(),
                   dim,
                   tokens,
                   dim,
                   experts,
                   shared,
                   top_k,
                   2.5f,
                   DType::kBf16,
                   1};
    if (out == &ours)
      cuda::router(p, host_launch());
    else
      cpu::router(p);
  }
  TML_CHECK(ours.ids == theirs.ids);
  for (std::size_t i = 0; i < ours.logits.size(); ++i)
    TML_CHECK_NEAR(ours.logits[i], theirs.logits[i], 1e-5);
  for (std::size_t i = 0; i < ours.weights.size(); ++i)
    TML_CHECK_NEAR(ours.weights[i], theirs.weights[i], 0x1p-7 * theirs.weights[i]);
  for (std::size_t i = 0; i < ours.gammas.size(); ++i)
    TML_CHECK_NEAR(ours.gammas[i], theirs.gammas[i], 0x1p-7 * theirs.gammas[i]);
}

struct Head {
  std::int64_t tokens, dim, vocab;
  std::vector<std::uint16_t> h, w, packed;
  std::vector<unsigned char> memory;

  Head(std::int64_t t, std::int64_t d, std::int64_t v)
      : tokens(t),
        dim(d),
        vocab(v),
        h(random_bf16(static_cast<std::size_t>(t * d), 1)),
        w(random_bf16(static_cast<std::size_t>(v * d), 2, 0.3f)),
        packed(packed_weight(w, v, d)) {}
  LmHeadInput input() const {
    return {h.data(), packed.data(), dim, tokens, dim, vocab, DType::kBf16};
  }
  cuda::Launch launch() {
    const std::size_t needed = cuda::lm_head_workspace_bytes(input());
    memory.assign(needed + 256, 0xff);
    const auto base = (reinterpret_cast<std::uintptr_t>(memory.data()) + 255) / 256 * 256;
    return host_launch(reinterpret_cast<void*>(base), needed);
  }
  std::vector<double> logits(std::int64_t row) const {
    std::vector<double> out;
    for (std::int64_t n = 0; n < vocab; ++n)
      out.push_back(mma_chain(h.data() + row * dim, w.data() + n * dim, dim));
    return out;
  }
};

double log_sum_exp(const std::vector<double>& x) {
  const double top = *std::max_element(x.begin(), x.end());
  double sum = 0.0;
  for (const double v : x) sum += std::exp(v - top);
  return top + std::log(sum);
}

TML_TEST(cuda_lm_head_logprobs_are_log_softmax) {
  for (const std::int64_t vocab : {100, 128, 700}) {
    Head head(3, 64, vocab);
    const std::vector<std::int64_t> targets = {0, vocab - 1, vocab / 2};
    std::vector<float> logprobs(3, 1.0f);
    cuda::lm_head_logprobs({head.input(), targets.data(), logprobs.data(), 1}, head.launch());
    for (std::int64_t row = 0; row < 3; ++row) {
      const auto logits = head.logits(row);
      const auto at = static_cast<std::size_t>(targets[static_cast<std::size_t>(row)]);
      TML_CHECK_NEAR(logprobs[static_cast<std::size_t>(row)], logits[at] - log_sum_exp(logits),
                     1e-5 + 1e-6 * std::fabs(logits[at]));
    }
  }
}

TML_TEST(cuda_lm_head_samples_what_the_cpu_samples) {
  // The draws share every bit; logits differ in the last ones, which decides no winner here.
  Head head(6, 64, 300);
  std::vector<std::uint16_t> host_packed(static_cast<std::size_t>(ceil_div(300, 32) * 32 * 32 * 2));
  cpu::pack_weight({head.w.data(), host_packed.data(), 64, 300, 64, DType::kBf16, 1});
  const std::vector<float> temperature = {0.0f, 1.0f, 0.7f, 2.0f, 1.0f, 0.0f};
  const std::vector<std::int32_t> no_k(6, 0);
  const std::vector<float> no_p(6, 1.0f);
  const std::vector<std::int64_t> seed = {1, 2, 3, 4, 5, 6}, position = {0, 9, 1 << 20, 3, 4, 5};
  std::vector<std::int32_t> allowed(6 * 10, -1);
  for (std::size_t i = 40; i < 60; ++i) allowed[i] = 0;
  allowed[43] = 1 << 5;                         // row 4: one id
  allowed[55] = static_cast<int>(0xf0f0f0f0u);  // row 5: some
  std::vector<std::int64_t> ours(6, -2), theirs(6, -3);
  std::vector<float> our_logprobs(6), their_logprobs(6);
  LmHeadSampleParams p{head.input(),
                       temperature.data(),
                       nullptr,
                       nullptr,
                       seed.data(),
                       position.data(),
                       allowed.data(),
                       ours.data(),
                       our_logprobs.data(),
                       1};
  cuda::lm_head_sample(p, head.launch());
  p.input.weight = host_packed.data();
  p.top_k = no_k.data();
  p.top_p = no_p.data();
  p.tokens = theirs.data();
  p.logprobs = their_logprobs.data();
  cpu::lm_head_sample(p);
  TML_CHECK(ours == theirs);
  TML_CHECK_EQUAL(ours[4], 3 * 32 + 5);
  for (std::size_t i = 0; i < 6; ++i) TML_CHECK_NEAR(our_logprobs[i], their_logprobs[i], 1e-4);
  // The same with top_k, top_p and both; more ids than a chunk in one of them.
  Head wide(5, 64, 2300);
  std::vector<std::uint16_t> wide_packed(
      static_cast<std::size_t>(ceil_div(2300, 32) * 32 * 32 * 2));
  cpu::pack_weight({wide.w.data(), wide_packed.data(), 64, 2300, 64, DType::kBf16, 1});
  const std::vector<float> hot = {1.5f, 1.0f, 30.0f, 0.8f, 0.0f},
                           mass = {1.0f, 0.6f, 0.9f, 0.5f, 0.5f};
  const std::vector<std::int32_t> most = {5, 0, 0, 40, 3};
  for (std::int64_t seeds = 0; seeds < 2; ++seeds) {
    const std::vector<std::int64_t> draw(5, seeds);
    std::vector<std::int64_t> a(5, -1), b(5, -2);
    std::vector<float> la(5), lb(5);
    LmHeadSampleParams f{wide.input(), hot.data(), most.data(), mass.data(), draw.data(),
                         draw.data(),  nullptr,    a.data(),    la.data(),   1};
    cuda::lm_head_sample(f, wide.launch());
    f.input.weight = wide_packed.data();
    f.tokens = b.data();
    f.logprobs = lb.data();
    cpu::lm_head_sample(f);
    TML_CHECK(a == b);
    for (std::size_t i = 0; i < 5; ++i) TML_CHECK_NEAR(la[i], lb[i], 1e-4);
  }
  // A row alone: the same token and the same bits.
  LmHeadSampleParams one = p;
  one.input = head.input();
  one.input.h = head.h.data() + 2 * 64;
  one.input.num_tokens = 1;
  one.top_k = nullptr;
  one.top_p = nullptr;
  one.temperature += 2;
  one.seed += 2;
  one.position += 2;
  one.allowed += 20;
  cuda::lm_head_sample(one, head.launch());
  TML_CHECK_EQUAL(theirs[0], ours[2]);
  TML_CHECK_EQUAL(their_logprobs[0], our_logprobs[2]);
}

// linear_logp and its gradients of a head, in passes of `room` tokens.
struct LogpRun {
  std::vector<float> logprobs, entropy, bwd_logprobs;
  std::vector<std::uint16_t> dh, dw;

  LogpRun(const Head& head, const std::vector<std::int64_t>& targets,
          const std::vector<float>& d_logprobs, const std::vector<float>* d_entropy,
          std::int64_t num_rows, cuda::LogpTiling tiling)
      : logprobs(targets.size()),
        entropy(targets.size()),
        bwd_logprobs(targets.size()),
        dh(head.h.size(), kPoison),
        dw(static_cast<std::size_t>(num_rows * head.dim), kPoison) {
    const LinearLogpParams fwd{head.input(), targets.data(), logprobs.data(), entropy.data(), 1};
    LinearLogpBwdParams bwd{};
    bwd.input = head.input();
    bwd.weight = head.w.data();
    bwd.weight_row_stride = head.dim;
    bwd.num_rows = num_rows;
    bwd.targets = targets.data();
    bwd.d_logprobs = d_logprobs.data();
    bwd.d_entropy = d_entropy == nullptr ? nullptr : d_entropy->data();
    bwd.logprobs = bwd_logprobs.data();
    bwd.dh = dh.data();
    bwd.dw = dw.data();
    std::vector<unsigned char> memory;
    const auto lend = [&](std::size_t needed) {
      memory.assign(needed + 256, 0xff);
      const auto base = (reinterpret_cast<std::uintptr_t>(memory.data()) + 255) / 256 * 256;
      return host_launch(reinterpret_cast<void*>(base), needed);
    };
    cuda::linear_logp(fwd, tiling, lend(cuda::linear_logp_workspace_bytes(fwd, tiling)));
    cuda::linear_logp_bwd(bwd, tiling, lend(cuda::linear_logp_bwd_workspace_bytes(bwd, tiling)));
  }
};

void check_logp(bool has_entropy) {
  const std::int64_t tokens = 40, dim = 24, vocab = 200, num_rows = 203;
  const Head head(tokens, dim, vocab);
  Random random(5);
  std::vector<std::int64_t> targets(static_cast<std::size_t>(tokens));
  for (std::int64_t& target : targets) target = random.below(vocab);
  const auto g = random_f32(targets.size(), 6), ge = random_f32(targets.size(), 7);
  const auto* d_entropy = has_entropy ? &ge : nullptr;
  const LogpRun whole(head, targets, g, d_entropy, num_rows, {16, 48});
  const LogpRun passes(head, targets, g, d_entropy, num_rows, {16, 16});
  TML_CHECK(whole.logprobs == passes.logprobs);
  TML_CHECK(whole.logprobs == passes.bwd_logprobs);
  TML_CHECK(whole.entropy == passes.entropy);
  TML_CHECK(whole.dh == passes.dh);
  TML_CHECK(whole.dw == passes.dw);

  std::vector<double> dh(head.h.size(), 0.0), dw(static_cast<std::size_t>(num_rows * dim), 0.0);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const auto row = static_cast<std::size_t>(t);
    const auto logits = head.logits(t);
    const double lse = log_sum_exp(logits);
    double entropy = 0.0;
    for (const double l : logits) entropy -= std::exp(l - lse) * (l - lse);
    TML_CHECK_NEAR(whole.entropy[row], entropy, 1e-4);
    TML_CHECK_NEAR(whole.logprobs[row], logits[static_cast<std::size_t>(targets[row])] - lse, 1e-4);
    for (std::int64_t n = 0; n < vocab; ++n) {
      const double logp = logits[static_cast<std::size_t>(n)] - lse, prob = std::exp(logp);
      double dl = static_cast<double>(g[row]) * ((n == targets[row] ? 1.0 : 0.0) - prob);
      if (has_entropy) dl -= static_cast<double>(ge[row]) * prob * (logp + entropy);
      for (std::int64_t k = 0; k < dim; ++k) {
        const auto h_at = static_cast<std::size_t>(t * dim + k);
        const auto w_at = static_cast<std::size_t>(n * dim + k);
        dh[h_at] += dl * static_cast<double>(to_float(head.w[w_at]));
        dw[w_at] += dl * static_cast<double>(to_float(head.h[h_at]));
      }
    }
  }
  // dl is rounded to bf16, and so is the result; sums are of a few large terms.
  for (std::size_t i = 0; i < dh.size(); ++i)
    TML_CHECK_NEAR(to_float(whole.dh[i]), dh[i], 0x1p-7 * std::fabs(dh[i]) + 0.01);
  for (std::size_t i = 0; i < dw.size(); ++i)
    TML_CHECK_NEAR(to_float(whole.dw[i]), dw[i], 0x1p-7 * std::fabs(dw[i]) + 0.02);
  for (std::size_t i = static_cast<std::size_t>(vocab * dim); i < dw.size(); ++i)
    TML_CHECK_EQUAL(whole.dw[i], 0);
}

TML_TEST(cuda_linear_logp_is_the_op_in_any_passes) {
  check_logp(false);
  check_logp(true);
}

TML_TEST(cuda_logp_tiling_is_the_contract_chain) {
  for (const std::int64_t vocab : {91, 50000, 201024, 3000000}) {
    const cuda::LogpTiling tiling = cuda::logp_tiling(vocab);
    TML_CHECK_EQUAL(tiling.chain, logp_block(vocab));
    TML_CHECK(tiling.room >= tiling.chain && tiling.room % tiling.chain == 0);
  }
}

}  // namespace
}  // namespace tml::tests
