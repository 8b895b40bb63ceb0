// moe of the device, run on the host: every output against the contract, spelt out.
#include <algorithm>

#include "core/tensor_core.h"
#include "cuda/moe.h"
#include "tests/cuda_kit.h"

namespace tml::tests {
namespace {

struct Layer {
  std::int64_t hidden, width;
  std::int32_t num_experts, num_shared, top_k;
  std::vector<std::uint16_t> gate_up, down, w13, w2;

  Layer(std::int64_t h, std::int64_t i, std::int32_t experts, std::int32_t shared, std::int32_t k)
      : hidden(h), width(i), num_experts(experts), num_shared(shared), top_k(k) {
    const std::int64_t count = experts + shared;
    gate_up = random_bf16(static_cast<std::size_t>(count * 2 * i * h), 1, 0.2f);
    down = random_bf16(static_cast<std::size_t>(count * h * i), 2, 0.2f);
    w13.assign(static_cast<std::size_t>(count * ((i + 31) / 32) * cuda::blocks_of(h)) *
                   cuda::kBlockElements,
               kPoison);
    w2.assign(static_cast<std::size_t>(count * cuda::blocks_of(h) * cuda::blocks_of(i)) *
                  cuda::kBlockElements,
              kPoison);
    cuda::pack_experts(
        {gate_up.data(), down.data(), w13.data(), w2.data(), count, h, i, DType::kBf16, 1},
        host_launch());
  }
};

struct Batch {
  std::int64_t num_tokens;
  std::vector<std::uint16_t> x;
  std::vector<std::int32_t> ids;
  std::vector<float> weights, gammas;

  Batch(const Layer& layer, std::int64_t tokens, std::uint64_t seed, bool skewed) {
    Random random(seed);
    num_tokens = tokens;
    x = random_bf16(static_cast<std::size_t>(tokens * layer.hidden), seed + 1);
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::vector<std::int32_t> row;
      while (static_cast<std::int32_t>(row.size()) < layer.top_k) {
        const auto id = skewed ? static_cast<std::int32_t>(row.size())
                               : static_cast<std::int32_t>(random.below(layer.num_experts));
        if (std::find(row.begin(), row.end(), id) == row.end()) row.push_back(id);
      }
      std::sort(row.begin(), row.end());
      ids.insert(ids.end(), row.begin(), row.end());
    }
    weights = random_f32(static_cast<std::size_t>(tokens * layer.top_k), seed + 2);
    gammas = random_f32(static_cast<std::size_t>(tokens * layer.num_shared), seed + 3);
  }
};

struct Result {
  std::vector<std::uint16_t> y, gate_up;
};

Result run(const Layer& layer, const Batch& batch, bool save) {
  Result out;
  const std::int64_t choices = layer.top_k + layer.num_shared;
  out.y.assign(static_cast<std::size_t>(batch.num_tokens * layer.hidden), kPoison);
  if (save)
    out.gate_up.assign(static_cast<std::size_t>(batch.num_tokens * choices * 2 * layer.width),
                       kPoison);
  MoeParams p{};
  p.x = batch.x.data();
  p.expert_ids = batch.ids.data();
  p.weights = batch.weights.data();
  p.gammas = batch.gammas.data();
  p.w13 = layer.w13.data();
  p.w2 = layer.w2.data();
  p.y = out.y.data();
  p.gate_up = save ? out.gate_up.data() : nullptr;
  p.x_row_stride = p.y_row_stride = p.hidden = layer.hidden;
  p.num_tokens = batch.num_tokens;
  p.width = layer.width;
  p.num_experts = layer.num_experts;
  p.num_shared = layer.num_shared;
  p.top_k = layer.top_k;
  p.dtype = DType::kBf16;
  // Poisoned: what no kernel wrote is NaN.
  std::vector<unsigned char> memory(cuda::moe_workspace_bytes(p) + 256, 0xff);
  const auto base = (reinterpret_cast<std::uintptr_t>(memory.data()) + 255) / 256 * 256;
  cuda::moe(p, host_launch(reinterpret_cast<void*>(base), memory.size() - 256));
  return out;
}

void check_contract(const Layer& layer, const Batch& batch) {
  const Result result = run(layer, batch, true);
  const std::int64_t h = layer.hidden, width = layer.width;
  const std::int32_t choices = layer.top_k + layer.num_shared;
  for (std::int64_t t = 0; t < batch.num_tokens; ++t) {
    std::vector<float> sum(static_cast<std::size_t>(h), 0.0f);
    for (std::int32_t j = 0; j < choices; ++j) {
      const bool routed = j < layer.top_k;
      const std::int64_t e = routed ? batch.ids[static_cast<std::size_t>(t * layer.top_k + j)]
                                    : layer.num_experts + j - layer.top_k;
      std::vector<std::uint16_t> act(static_cast<std::size_t>(width));
      const auto* saved = result.gate_up.data() + (t * choices + j) * 2 * width;
      for (std::int64_t i = 0; i < width; ++i) {
        const auto* matrix = layer.gate_up.data() + e * 2 * width * h;
        const float gate = mma_chain(matrix + i * h, batch.x.data() + t * h, h);
        const float up = mma_chain(matrix + (width + i) * h, batch.x.data() + t * h, h);
        TML_CHECK_EQUAL(saved[i], to_bf16(gate));
        TML_CHECK_EQUAL(saved[width + i], to_bf16(up));
        float value = cuda::silu(gate) * up;
        if (!routed)
          value *= batch.gammas[static_cast<std::size_t>(t * layer.num_shared + j - layer.top_k)];
        act[static_cast<std::size_t>(i)] = to_bf16(value);
      }
      for (std::int64_t n = 0; n < h; ++n) {
        const float out = mma_chain(layer.down.data() + (e * h + n) * width, act.data(), width);
        float& s = sum[static_cast<std::size_t>(n)];
        s = routed ? __builtin_fmaf(batch.weights[static_cast<std::size_t>(t * layer.top_k + j)],
                                    out, s)
                   : s + out;
      }
    }
    for (std::int64_t n = 0; n < h; ++n)
      TML_CHECK_EQUAL(result.y[static_cast<std::size_t>(t * h + n)],
                      to_bf16(sum[static_cast<std::size_t>(n)]));
  }
}

TML_TEST(cuda_moe_is_the_contract) {
  check_contract(Layer(72, 40, 5, 1, 2), Batch(Layer(72, 40, 5, 1, 2), 3, 7, false));
  const Layer layer(64, 50, 6, 2, 3);
  check_contract(layer, Batch(layer, 1, 8, false));
  check_contract(layer, Batch(layer, 20, 9, true));
}

TML_TEST(cuda_moe_dense_is_one_expert) {
  const Layer layer(64, 96, 1, 0, 1);
  check_contract(layer, Batch(layer, 9, 3, true));
}

// A token alone and in batches of any size (every tile width) has the same bits.
TML_TEST(cuda_moe_rows_do_not_see_their_batch) {
  const Layer layer(64, 32, 4, 1, 2);
  const Batch all(layer, 300, 5, false);
  const Result whole = run(layer, all, false);
  for (const std::int64_t count : {1, 7, 16, 31, 100}) {
    Batch some = all;
    some.num_tokens = count;
    const Result part = run(layer, some, false);
    TML_CHECK(std::equal(part.y.begin(), part.y.end(), whole.y.begin()));
  }
}

TML_TEST(cuda_moe_plan_finds_tiles) {
  const std::vector<std::int32_t> begin = {0, 0, 2, 2, 5, 6};
  const int expected[] = {1, 1, 3, 3, 3, 4};
  for (int i = 0; i < 6; ++i) TML_CHECK_EQUAL(cuda::group_of_tile(begin.data(), 5, i), expected[i]);
}

TML_TEST(cuda_moe_refuses_a_small_workspace) {
  const Layer layer(64, 32, 2, 0, 1);
  MoeParams p{};
  p.num_tokens = 1;
  p.hidden = 64;
  p.width = 32;
  p.num_experts = 2;
  p.top_k = 1;
  bool refused = false;
  try {
    cuda::moe(p, host_launch());
  } catch (const std::invalid_argument& error) {
    refused = std::strstr(error.what(), "moe: workspace must be at least") != nullptr;
  }
  TML_CHECK(refused);
}

// Every gradient against the contract, spelt out; gate | up are those of the forward pass.
void check_bwd(const Layer& layer, const Batch& batch) {
  const std::int64_t h = layer.hidden, width = layer.width, tokens = batch.num_tokens;
  const std::int32_t choices = layer.top_k + layer.num_shared;
  const std::int64_t count = layer.num_experts + layer.num_shared;
  const auto saved = run(layer, batch, true).gate_up;
  const auto dy = random_bf16(static_cast<std::size_t>(tokens * h), 21);
  std::vector<std::uint16_t> dx(dy.size(), kPoison), dw13(layer.gate_up.size(), kPoison);
  std::vector<std::uint16_t> dw2(layer.down.size(), kPoison);
  std::vector<float> dweights(batch.weights.size(), -1.0f), dgammas(batch.gammas.size(), -1.0f);
  MoeBwdParams p{};
  p.dy = dy.data();
  p.x = batch.x.data();
  p.expert_ids = batch.ids.data();
  p.weights = batch.weights.data();
  p.gammas = batch.gammas.data();
  p.gate_up = saved.data();
  p.w13 = layer.gate_up.data();
  p.w2 = layer.down.data();
  p.dx = dx.data();
  p.dweights = dweights.data();
  p.dgammas = dgammas.data();
  p.dw13 = dw13.data();
  p.dw2 = dw2.data();
  p.dy_row_stride = p.x_row_stride = p.hidden = h;
  p.num_tokens = tokens;
  p.width = width;
  p.num_experts = layer.num_experts;
  p.num_shared = layer.num_shared;
  p.top_k = layer.top_k;
  p.dtype = DType::kBf16;
  std::vector<unsigned char> memory(cuda::moe_bwd_workspace_bytes(p) + 256, 0xff);
  const auto base = (reinterpret_cast<std::uintptr_t>(memory.data()) + 255) / 256 * 256;
  cuda::moe_bwd(p, host_launch(reinterpret_cast<void*>(base), memory.size() - 256));

  using Rows = std::vector<std::vector<std::uint16_t>>;
  const auto column_of = [](const Rows& rows, std::int64_t column) {
    std::vector<std::uint16_t> out;
    for (const auto& row : rows) out.push_back(row[static_cast<std::size_t>(column)]);
    return out;
  };
  const auto chains = [](const std::vector<std::uint16_t>& a, const std::vector<std::uint16_t>& b) {
    float total = 0.0f;
    for (std::size_t t = 0; t < a.size(); t += 512)
      total += mma_chain(b.data() + t, a.data() + t,
                         static_cast<std::int64_t>(std::min<std::size_t>(512, a.size() - t)));
    return total;
  };
  std::vector<Rows> of_x(static_cast<std::size_t>(count)), of_dy = of_x, of_g = of_x, of_a = of_x;
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::vector<float> sum(static_cast<std::size_t>(h), 0.0f);
    const auto* dy_row = dy.data() + t * h;
    for (std::int32_t j = 0; j < choices; ++j) {
      const bool routed = j < layer.top_k;
      const auto at = static_cast<std::size_t>(routed ? t * layer.top_k + j
                                                      : t * layer.num_shared + j - layer.top_k);
      const std::int64_t e = routed ? batch.ids[at] : layer.num_experts + j - layer.top_k;
      const float scale = routed ? batch.weights[at] : batch.gammas[at];
      const auto* row = saved.data() + (t * choices + j) * 2 * width;
      std::vector<std::uint16_t> g(static_cast<std::size_t>(2 * width));
      std::vector<std::uint16_t> a_row(static_cast<std::size_t>(width));
      float lanes[16] = {};
      for (std::int64_t i = 0; i < width; ++i) {
        std::vector<std::uint16_t> w2(static_cast<std::size_t>(h));
        for (std::int64_t n = 0; n < h; ++n)
          w2[static_cast<std::size_t>(n)] =
              layer.down[static_cast<std::size_t>((e * h + n) * width + i)];
        const float u = mma_chain(w2.data(), dy_row, h);
        const float gate = to_float(row[i]), up = to_float(row[width + i]);
        const float denominator = 1.0f + cuda::exp_poly(-gate);
        const float sig = 1.0f / denominator, act = gate / denominator;
        const float a = act * up, du = scale * u;
        lanes[i % 16] = __builtin_fmaf(u, routed ? cuda::round_to_bf16(a) : a, lanes[i % 16]);
        const auto unit = static_cast<std::size_t>(i);
        g[unit] = to_bf16(du * up * __builtin_fmaf(act, 1.0f - sig, sig));
        g[unit + static_cast<std::size_t>(width)] = to_bf16(du * act);
        a_row[unit] = to_bf16(scale * a);
      }
      for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
      TML_CHECK_EQUAL((routed ? dweights : dgammas)[at], lanes[0]);
      for (std::int64_t n = 0; n < h; ++n) {
        std::vector<std::uint16_t> w13(g.size());
        for (std::int64_t i = 0; i < 2 * width; ++i)
          w13[static_cast<std::size_t>(i)] =
              layer.gate_up[static_cast<std::size_t>((e * 2 * width + i) * h + n)];
        sum[static_cast<std::size_t>(n)] += mma_chain(w13.data(), g.data(), 2 * width);
      }
      const auto expert = static_cast<std::size_t>(e);
      of_x[expert].emplace_back(batch.x.data() + t * h, batch.x.data() + (t + 1) * h);
      of_dy[expert].emplace_back(dy_row, dy_row + h);
      of_g[expert].push_back(g);
      of_a[expert].push_back(a_row);
    }
    for (std::int64_t n = 0; n < h; ++n)
      TML_CHECK_EQUAL(dx[static_cast<std::size_t>(t * h + n)],
                      to_bf16(sum[static_cast<std::size_t>(n)]));
  }
  for (std::int64_t e = 0; e < count; ++e) {
    const auto expert = static_cast<std::size_t>(e);
    for (std::int64_t n = 0; n < h; ++n) {
      const auto x = column_of(of_x[expert], n), d = column_of(of_dy[expert], n);
      for (std::int64_t i = 0; i < 2 * width; ++i)
        TML_CHECK_EQUAL(dw13[static_cast<std::size_t>((e * 2 * width + i) * h + n)],
                        to_bf16(chains(column_of(of_g[expert], i), x)));
      for (std::int64_t i = 0; i < width; ++i)
        TML_CHECK_EQUAL(dw2[static_cast<std::size_t>((e * h + n) * width + i)],
                        to_bf16(chains(d, column_of(of_a[expert], i))));
    }
  }
}

TML_TEST(cuda_moe_bwd_is_the_contract) {
  const Layer layer(72, 40, 5, 1, 2);
  check_bwd(layer, Batch(layer, 3, 7, false));  // some experts have no token
  const Layer odd(64, 27, 6, 2, 3);
  check_bwd(odd, Batch(odd, 70, 9, true));  // more than one block of tokens
}

TML_TEST(cuda_moe_bwd_cuts_chains) {
  const Layer layer(16, 8, 1, 0, 1);
  check_bwd(layer, Batch(layer, 600, 3, true));
}

}  // namespace
}  // namespace tml::tests
