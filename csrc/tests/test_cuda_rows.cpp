// The row ops of the device, run on the host, against the CPU kernels (their sums have another
// tree: a tolerance of one rounding) and against themselves (chunked = whole, bit for bit).
#include "cpu/cpu.h"
#include "cuda/step.h"
#include "tests/cuda_kit.h"

namespace tml::tests {
namespace {

// One step of bf16: a sum's last bit may move a rounding.
void check_close(const std::vector<std::uint16_t>& a, const std::vector<std::uint16_t>& b) {
  TML_CHECK_EQUAL(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i)
    TML_CHECK_NEAR(to_float(a[i]), to_float(b[i]), 0x1p-6 * std::fabs(to_float(b[i])) + 1e-30);
}
void check_close(const std::vector<float>& a, const std::vector<float>& b) {
  TML_CHECK_EQUAL(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i)
    TML_CHECK_NEAR(a[i], b[i], 1e-5 * std::fabs(b[i]) + 1e-6);
}
template <class T>
std::vector<T> random_values(std::size_t count, std::uint64_t seed);
template <>
std::vector<float> random_values(std::size_t count, std::uint64_t seed) {
  return random_f32(count, seed);
}
template <>
std::vector<std::uint16_t> random_values(std::size_t count, std::uint64_t seed) {
  return random_bf16(count, seed);
}
template <class T>
constexpr DType dtype_of() {
  return sizeof(T) == 2 ? DType::kBf16 : DType::kF32;
}

template <class T>
void check_rms_norm(std::int64_t rows, std::int64_t dim, std::int64_t stride, float divisor,
                    bool gelu) {
  const auto x = random_values<T>(static_cast<std::size_t>(rows * stride), 1);
  const auto weight = random_values<T>(static_cast<std::size_t>(dim), 2);
  std::vector<T> ours(x.size(), T{1}), theirs(x.size(), T{1});
  RmsNormParams p{x.data(), weight.data(), ours.data(), stride, stride,        rows,
                  dim,      1e-6f,         divisor,     gelu,   dtype_of<T>(), 1};
  cuda::rms_norm(p, host_launch());
  p.y = theirs.data();
  cpu::rms_norm(p);
  check_close(ours, theirs);
}

TML_TEST(cuda_rms_norm_is_the_op) {
  for (const std::int64_t dim : {1, 19, 256, 2056, 4096}) {
    check_rms_norm<std::uint16_t>(3, dim, dim, 1.0f, false);
    check_rms_norm<std::uint16_t>(2, dim, dim + 5, 3.0f, true);
    check_rms_norm<float>(2, dim, dim + 1, 1.0f, true);
  }
}

TML_TEST(cuda_embed_is_the_op) {
  const std::int64_t dim = 264, rows = 12;
  const auto table = random_bf16(static_cast<std::size_t>(rows * dim), 1);
  const auto weight = random_bf16(static_cast<std::size_t>(dim), 2);
  const std::vector<std::int64_t> ids = {0, 11, 5, 5};
  std::vector<std::uint16_t> ours(ids.size() * dim, kPoison), theirs = ours;
  EmbedParams p{ids.data(),
                table.data(),
                weight.data(),
                ours.data(),
                dim,
                dim,
                static_cast<std::int64_t>(ids.size()),
                dim,
                1e-6f,
                DType::kBf16,
                1};
  cuda::embed(p, host_launch());
  p.y = theirs.data();
  cpu::embed(p);
  check_close(ours, theirs);
}

TML_TEST(cuda_dmel_embed_is_the_op) {
  const std::int64_t dim = 136, channels = 10, levels = 4, frames = 3;
  const auto table = random_bf16(static_cast<std::size_t>(channels * levels * dim), 1);
  const auto weight = random_bf16(static_cast<std::size_t>(dim), 2);
  Random random(3);
  std::vector<std::int32_t> bins(static_cast<std::size_t>(frames * channels));
  for (std::int32_t& bin : bins) bin = static_cast<std::int32_t>(random.below(levels));
  std::vector<std::uint16_t> ours(static_cast<std::size_t>(frames * dim), kPoison), theirs = ours;
  DmelEmbedParams p{
      bins.data(), table.data(), weight.data(), ours.data(), dim,          dim, frames,
      channels,    levels,       dim,           1e-6f,       DType::kBf16, 1};
  cuda::dmel_embed(p, host_launch());
  p.y = theirs.data();
  cpu::dmel_embed(p);
  check_close(ours, theirs);
}

// One layer's convolution and norm over two interleaved sequences, fed in steps of given sizes.
template <class T>
struct SconvRun {
  static constexpr std::int64_t kDim = 48;
  std::vector<T> x, residual, normed, state, weight;
  std::vector<float> taps;

  explicit SconvRun(std::int64_t num_tokens)
      : x(random_values<T>(static_cast<std::size_t>(2 * num_tokens * kDim), 1)),
        residual(random_values<T>(x.size(), 2)),
        normed(x.size(), T{}),
        state(random_values<T>(3 * 3 * kDim, 3)),  // three slots
        weight(random_values<T>(kDim, 4)),
        taps(random_f32(kDim * 4, 5)) {}

  // Tokens [begin, end) of both sequences; sequence s of n tokens starts at row s * n.
  template <class Run>
  void step(std::int64_t n, std::int64_t begin, std::int64_t end, const Run& run) {
    const std::int64_t count = end - begin;
    const std::vector<std::int32_t> cu = {0, static_cast<std::int32_t>(count),
                                          static_cast<std::int32_t>(2 * count)};
    const std::vector<std::int32_t> slots = {2, 0};
    std::vector<T> step_x, step_residual;
    for (std::int64_t s = 0; s < 2; ++s) {
      const auto from = (s * n + begin) * kDim, to = (s * n + end) * kDim;
      step_x.insert(step_x.end(), x.begin() + from, x.begin() + to);
      step_residual.insert(step_residual.end(), residual.begin() + from, residual.begin() + to);
    }
    std::vector<T> step_normed(step_x.size(), T{1});
    SconvNormParams p{};
    p.x = step_x.data();
    p.residual = step_residual.data();
    p.conv_weight = taps.data();
    p.norm_weight = weight.data();
    p.normed = step_normed.data();
    p.batch = {cu.data(), slots.data(), nullptr, nullptr, 2, 2 * count};
    p.conv = {state.data(), 3 * kDim, kDim};
    p.x_row_stride = p.residual_row_stride = p.normed_row_stride = p.dim = kDim;
    p.eps = 1e-6f;
    p.dtype = dtype_of<T>();
    p.num_threads = 1;
    run(p);
    for (std::int64_t s = 0; s < 2; ++s)
      for (std::int64_t i = 0; i < count * kDim; ++i) {
        residual[static_cast<std::size_t>((s * n + begin) * kDim + i)] =
            step_residual[static_cast<std::size_t>(s * count * kDim + i)];
        normed[static_cast<std::size_t>((s * n + begin) * kDim + i)] =
            step_normed[static_cast<std::size_t>(s * count * kDim + i)];
      }
  }
};

template <class T>
void check_sconv_norm() {
  constexpr std::int64_t kTokens = 9;
  const auto device = [](const SconvNormParams& p) { cuda::sconv_norm(p, host_launch()); };
  SconvRun<T> whole(kTokens), chunked(kTokens), host(kTokens);
  whole.step(kTokens, 0, kTokens, device);
  host.step(kTokens, 0, kTokens, [](const SconvNormParams& p) { cpu::sconv_norm(p); });
  const std::int64_t cuts[] = {0, 1, 3, 4, 8, kTokens};
  for (int i = 0; i < 5; ++i) chunked.step(kTokens, cuts[i], cuts[i + 1], device);
  TML_CHECK(whole.residual == chunked.residual);
  TML_CHECK(whole.normed == chunked.normed);
  TML_CHECK(whole.state == chunked.state);
  TML_CHECK(whole.residual == host.residual);  // no reduction: the CPU's bits
  TML_CHECK(whole.state == host.state);
  check_close(whole.normed, host.normed);
}

TML_TEST(cuda_sconv_norm_is_the_op_in_any_chunks) {
  check_sconv_norm<std::uint16_t>();
  check_sconv_norm<float>();
}

TML_TEST(cuda_step_shares_cover_every_token_once) {
  const std::vector<std::int32_t> cu = {0, 0, 1, 1, 8, 11, 11};
  const StepBatch batch{cu.data(), nullptr, nullptr, nullptr, 6, 11};
  std::vector<int> seen(11, 0);
  for (std::int64_t token = 0; token < 11; ++token) {
    const cuda::StepShare share = cuda::share_of(batch, token);
    for (std::int64_t i = 0; i < share.count; ++i)
      ++seen[static_cast<std::size_t>(cu[static_cast<std::size_t>(share.seq)] + share.offset + i)];
  }
  TML_CHECK(seen == std::vector<int>(11, 1));
}

TML_TEST(cuda_functions_are_the_cpu_polynomials) {
  for (float x = -90.0f; x < 90.0f; x += 0.37f) {
    TML_CHECK_NEAR(cuda::exp_poly(x) / std::exp(static_cast<double>(x)), x < -87.0f ? 0.0 : 1.0,
                   x > 88.3f ? 10.0 : 4e-7);
    if (x > 0.0f) TML_CHECK_NEAR(cuda::log_poly(x), std::log(static_cast<double>(x)), 1e-6);
    TML_CHECK_NEAR(cuda::gelu(x), 0.5 * x * (1 + std::erf(x * std::sqrt(0.5))), 1e-5);
  }
  TML_CHECK(cuda::exp_poly(__builtin_nanf("")) != 0.0f);
}

}  // namespace
}  // namespace tml::tests
