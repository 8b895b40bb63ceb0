// router: a warp owns an output and eight tokens (lane l sums elements 4 l .. 4 l + 3 of every 128
// by an ascending fma chain, then the tree of warp_sum), so a weight row is read once for eight
// tokens; then a warp owns a token and picks the largest key, top_k times.
#include "cuda/cuda.h"
#include "cuda/router_terms.h"
#include "cuda/row.h"
#include "ops/router.h"

namespace tml::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTokens = 8;
constexpr int kPerLane = kRouterMaxOutputs / 32;

struct RouteParams {
  RouterParams op;
  float* logits;
  std::int32_t num_outputs;
};

template <class T>
TML_DEVICE float element(const T* p);
template <>
TML_DEVICE float element(const float* p) {
  return *p;
}
template <>
TML_DEVICE float element(const std::uint16_t* p) {
  return low_bf16(*p);
}

template <class T>
TML_KERNEL(kThreads, 2)
router_logits_kernel(const TML_GRID_CONSTANT RouteParams p) {
  grid_launch_dependents();
  grid_wait();
  const RouterParams& op = p.op;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto groups = static_cast<unsigned>((p.num_outputs + kWarps - 1) / kWarps);
  const std::int32_t output =
      static_cast<std::int32_t>(blockIdx.x % groups * kWarps + threadIdx.x / 32);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x / groups) * kTokens;
  if (output >= p.num_outputs) return;
  const auto* weight = static_cast<const float*>(op.weight) + output * op.in_dim;
  float sum[kTokens] = {};
  for (std::int64_t k = lane * 4; k < op.in_dim; k += 128) {
    float w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = k + i < op.in_dim ? weight[k + i] : 0.0f;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (first + t >= op.num_tokens) break;
      const T* x = static_cast<const T*>(op.x) + (first + t) * op.x_row_stride + k;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sum[t] = __fmaf_rn(k + i < op.in_dim ? element(x + i) : 0.0f, w[i], sum[t]);
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const float total = warp_sum(sum[t]);
    if (lane == 0 && first + t < op.num_tokens)
      p.logits[(first + t) * p.num_outputs + output] = total;
  }
}

// Larger is the higher score, then the lower id; NaN is below every number. Never 0.
TML_DEVICE std::uint64_t key_of(float score, std::int32_t id) {
  const std::uint32_t bits = float_to_bits(__fadd_rn(score, 0.0f));  // -0 is +0
  const std::uint32_t ordered = bits ^ ((bits >> 31) != 0 ? ~0u : 0x80000000u);
  return static_cast<std::uint64_t>(score == score ? ordered : 0u) << 32 |
         static_cast<std::uint32_t>(~id);
}

template <class T>
TML_KERNEL(kThreads, 2)
router_choose_kernel(const TML_GRID_CONSTANT RouteParams p) {
  grid_launch_dependents();
  grid_wait();
  const RouterParams& op = p.op;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (token >= op.num_tokens) return;
  const float* logits = p.logits + token * p.num_outputs;
  std::uint64_t keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const std::int32_t id = i * 32 + lane;
    keys[i] = 0;
    if (id >= op.num_experts) continue;
    const float score = __fdiv_rn(1.0f, __fadd_rn(1.0f, exp_poly(-logits[id])));
    keys[i] = key_of(__fadd_rn(score, op.bias[id]), id);
  }
  std::int32_t chosen = 0;  // of lane j: the j-th best
  for (std::int32_t j = 0; j < op.top_k; ++j) {
    std::uint64_t best = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) best = keys[i] > best ? keys[i] : best;
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      const std::uint64_t other = __shfl_xor_sync(kFullMask, best, mask);
      best = other > best ? other : best;
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (keys[i] == best) keys[i] = 0;
    if (lane == j) chosen = static_cast<std::int32_t>(~static_cast<std::uint32_t>(best));
  }
  // Lane j of the terms: chosen experts by ascending id, then the shared ones.
  std::int32_t rank = 0;
  for (std::int32_t j = 0; j < op.top_k; ++j)
    rank += __shfl_sync(kFullMask, chosen, j) < chosen ? 1 : 0;
  std::int32_t id = op.num_experts + lane - op.top_k;
  for (std::int32_t j = 0; j < op.top_k; ++j) {
    const std::int32_t other = __shfl_sync(kFullMask, chosen, j);
    if (__shfl_sync(kFullMask, rank, j) == lane) id = other;
  }
  const std::int32_t num_terms = op.top_k + op.num_shared;
  float term = lane < num_terms ? log_sigmoid(logits[id]) : 0.0f;
  float top = __shfl_sync(kFullMask, term, 0);
  for (std::int32_t j = 1; j < num_terms; ++j) {
    const float other = __shfl_sync(kFullMask, term, j);
    top = other > top ? other : top;
  }
  term = exp_poly(__fadd_rn(term, -top));
  float sum = 0.0f;
  for (std::int32_t j = 0; j < num_terms; ++j)
    sum = __fadd_rn(sum, __shfl_sync(kFullMask, term, j));
  const float weight = round_as<T>(__fmul_rn(__fdiv_rn(term, sum), op.scale));
  if (lane < op.top_k) {
    op.expert_ids[token * op.top_k + lane] = id;
    op.weights[token * op.top_k + lane] = weight;
  } else if (lane < num_terms) {
    op.gammas[token * op.num_shared + lane - op.top_k] = weight;
  }
}

template <class T>
void router_typed(const RouteParams& p, const Launch& launch) {
  const std::int64_t tokens = (p.op.num_tokens + kTokens - 1) / kTokens;
  const std::int64_t groups = (p.num_outputs + kWarps - 1) / kWarps;
  launch_kernel("router", launch, router_logits_kernel<T>, static_cast<unsigned>(tokens * groups),
                kThreads, 0, p);
  launch_kernel("router", launch, router_choose_kernel<T>,
                static_cast<unsigned>((p.op.num_tokens + kWarps - 1) / kWarps), kThreads, 0, p);
}

}  // namespace

std::size_t router_workspace_bytes(const RouterParams& p) {
  if (p.logits != nullptr) return 0;
  return static_cast<std::size_t>(p.num_tokens * (p.num_experts + p.num_shared)) * sizeof(float);
}

void router(const RouterParams& p, const Launch& launch) {
  if (p.num_tokens == 0) return;
  if (p.top_k + p.num_shared > 32)
    throw std::invalid_argument("router: top_k + shared must be at most 32 on cuda, got " +
                                std::to_string(p.top_k + p.num_shared));
  check_workspace("router", launch, router_workspace_bytes(p));
  const RouteParams params{p,
                           p.logits != nullptr ? p.logits : static_cast<float*>(launch.workspace),
                           p.num_experts + p.num_shared};
  if (p.dtype == DType::kF32) return router_typed<float>(params, launch);
  router_typed<std::uint16_t>(params, launch);
}

}  // namespace tml::cuda
