// moe: the plan, the combine and the choice of tiles (a matter of speed alone).
#include "cuda/cuda.h"
#include "cuda/moe.h"
#include "cuda/row.h"

namespace tml::cuda {
namespace {

constexpr int kPlanThreads = 1024;
// Tokens whose choices fit one bitmask in shared memory.
constexpr int kPlanTokens = 1024;
constexpr int kPlanWords = kPlanTokens / 32;
constexpr int kPackThreads = 256;

// Words of shared memory before the counts: the mask, or the sums that lie there before it.
TML_HOST_DEVICE constexpr std::int32_t mask_words(std::int32_t num_experts) {
  const std::int32_t mask = num_experts * kPlanWords;
  return mask > 4 * kPlanThreads ? mask : 4 * kPlanThreads;
}

struct PlanParams {
  const std::int32_t* expert_ids;  // [num_tokens, top_k]
  MoePlan plan;
  MoeShape shape;
  std::int32_t tokens_per_tile;
};

// One block. The rank of a token inside its expert is the number of earlier tokens with that
// expert: bits of a mask, set in any order. counts[e] first holds totals, then the next free place
// of e.
TML_KERNEL(kPlanThreads, 1) moe_plan_kernel(const TML_GRID_CONSTANT PlanParams p) {
  grid_launch_dependents();
  grid_wait();
  const std::int32_t num_experts = p.shape.num_experts;
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  auto* const mask = reinterpret_cast<unsigned*>(shared_memory());
  auto* const counts = reinterpret_cast<int*>(mask + mask_words(num_experts));
  for (std::int32_t e = thread; e < num_experts; e += kPlanThreads) counts[e] = 0;
  __syncthreads();
  const std::int64_t num_pairs = p.shape.num_tokens * p.shape.top_k;
  for (std::int64_t i = thread; i < num_pairs; i += kPlanThreads)
    atomicAdd(counts + p.expert_ids[i], 1);
  __syncthreads();
  // Inclusive sums over the groups, of pairs and of token tiles (num_groups <= kPlanThreads).
  auto* const sums = reinterpret_cast<int*>(mask);  // [2][2][kPlanThreads], before it is a mask
  const std::int32_t num_groups = p.shape.num_groups();
  const bool is_expert = thread < num_experts;
  const int own = is_expert             ? counts[thread]
                  : thread < num_groups ? static_cast<int>(p.shape.num_tokens)
                                        : 0;
  const int own_tiles = (own + p.tokens_per_tile - 1) / p.tokens_per_tile;
  int pairs = is_expert ? own : 0, tiles = own_tiles;
  for (int step = 1, side = 0; step < num_groups; step *= 2, side ^= 1) {
    int* const pair_sums = sums + side * 2 * kPlanThreads;
    pair_sums[thread] = pairs;
    pair_sums[kPlanThreads + thread] = tiles;
    __syncthreads();
    if (thread >= step) {
      pairs += pair_sums[thread - step];
      tiles += pair_sums[kPlanThreads + thread - step];
    }
  }
  if (is_expert) {
    p.plan.offsets[thread] = pairs - own;
    counts[thread] = pairs - own;
    if (thread == num_experts - 1) p.plan.offsets[num_experts] = pairs;
  }
  if (thread < num_groups) {
    p.plan.tile_begin[thread] = tiles - own_tiles;
    if (thread == num_groups - 1) p.plan.tile_begin[num_groups] = tiles;
  }
  __syncthreads();
  for (std::int64_t first = 0; first < p.shape.num_tokens; first += kPlanTokens) {
    const std::int64_t left = p.shape.num_tokens - first;
    const std::int32_t tokens = static_cast<std::int32_t>(left < kPlanTokens ? left : kPlanTokens);
    for (std::int32_t i = thread; i < num_experts * kPlanWords; i += kPlanThreads) mask[i] = 0;
    __syncthreads();
    const std::int32_t pairs = tokens * p.shape.top_k;
    const std::int32_t* ids = p.expert_ids + first * p.shape.top_k;
    for (std::int32_t i = thread; i < pairs; i += kPlanThreads) {
      const std::int32_t token = i / p.shape.top_k;
      atomicOr(mask + ids[i] * kPlanWords + token / 32, 1u << (token % 32));
    }
    __syncthreads();
    for (std::int32_t i = thread; i < pairs; i += kPlanThreads) {
      const std::int32_t token = i / p.shape.top_k, choice = i % p.shape.top_k;
      const unsigned* words = mask + ids[i] * kPlanWords;
      int rank = __popc(words[token / 32] & ((1u << (token % 32)) - 1u));
      for (std::int32_t w = 0; w < token / 32; ++w) rank += __popc(words[w]);
      p.plan.pairs[counts[ids[i]] + rank] =
          static_cast<std::int32_t>(first + token) * p.shape.choices() + choice;
    }
    __syncthreads();
    for (std::int32_t e = thread; e < num_experts; e += kPlanThreads)
      for (std::int32_t w = 0; w < kPlanWords; ++w) counts[e] += __popc(mask[e * kPlanWords + w]);
  }
}

struct CombineParams {
  const float* out;  // [num_tokens, choices, hidden]
  const float* weights;
  Bf16* y;
  std::int64_t y_row_stride;
  MoeShape shape;
  bool is_aligned;
};

// A block owns a token: ascending expert id by fma from 0, then the shared ones, one rounding.
TML_KERNEL(kRowThreads, 4) moe_combine_kernel(const TML_GRID_CONSTANT CombineParams p) {
  grid_launch_dependents();
  grid_wait();
  const std::int64_t token = blockIdx.x;
  const float* rows = p.out + token * p.shape.choices() * p.shape.hidden;
  each_group(p.shape.hidden, [&](std::int64_t i, std::int64_t count) {
    float sum[8] = {};
    for (std::int32_t j = 0; j < p.shape.choices(); ++j) {
      float v[8];
      load_eight(v, rows + j * p.shape.hidden + i, count, p.is_aligned);
      const bool is_routed = p.weights != nullptr && j < p.shape.top_k;
      const float weight = is_routed ? p.weights[token * p.shape.top_k + j] : 1.0f;
#pragma unroll
      for (int e = 0; e < 8; ++e)
        sum[e] = is_routed ? __fmaf_rn(weight, v[e], sum[e]) : __fadd_rn(sum[e], v[e]);
    }
    store_eight(p.y + token * p.y_row_stride + i, sum, count, p.is_aligned);
  });
}

// A thread owns eight k of one packed row of a matrix; row_of(row) < 0: padding.
template <class Source>
TML_DEVICE void pack_rows(Bf16* packed, std::int64_t num_matrices, std::int64_t row_blocks,
                          std::int64_t in_dim, const Source& source) {
  const std::int64_t k_blocks = blocks_of(in_dim), chunks = k_blocks * 8;
  const std::int64_t rows = row_blocks * kBlockRows, total = num_matrices * rows * chunks;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
       i < total; i += static_cast<std::int64_t>(gridDim.x) * kPackThreads) {
    const std::int64_t matrix = i / (rows * chunks), row = i / chunks % rows, k = i % chunks * 8;
    const Bf16* from = source(matrix, row);
    alignas(16) Bf16 chunk[8];
#pragma unroll
    for (int j = 0; j < 8; ++j)
      chunk[j] = from != nullptr && k + j < in_dim ? from[k + j] : Bf16{0};
    *reinterpret_cast<uint4*>(packed + matrix * row_blocks * k_blocks * kBlockElements +
                              weight_offset(row, k, k_blocks)) =
        *reinterpret_cast<const uint4*>(chunk);
  }
}

TML_KERNEL(kPackThreads, 4) pack_experts_kernel(const TML_GRID_CONSTANT PackExpertsParams p) {
  grid_launch_dependents();
  grid_wait();
  pack_rows(static_cast<Bf16*>(p.w13), p.num_matrices, (p.width + kBlockUnits - 1) / kBlockUnits,
            p.hidden, [&](std::int64_t matrix, std::int64_t row) -> const Bf16* {
              const std::int64_t unit = swiglu_unit(row);
              if (unit >= p.width) return nullptr;
              const std::int64_t from = swiglu_is_up(row) ? p.width + unit : unit;
              return static_cast<const Bf16*>(p.gate_up) + (matrix * 2 * p.width + from) * p.hidden;
            });
  pack_rows(static_cast<Bf16*>(p.w2), p.num_matrices, blocks_of(p.hidden), p.width,
            [&](std::int64_t matrix, std::int64_t row) -> const Bf16* {
              if (row >= p.hidden) return nullptr;
              return static_cast<const Bf16*>(p.down) + (matrix * p.hidden + row) * p.width;
            });
}

struct MoeWorkspace {
  MoePlan plan;
  Bf16* h;
  float* out;
  std::int64_t h_stride;
  std::size_t num_bytes;

  MoeWorkspace(const MoeShape& s, void* base) : h_stride((s.width + 7) / 8 * 8) {
    Workspace parts(base);
    plan = take_plan(s, parts);
    h = parts.take<Bf16>(s.num_tokens * s.choices() * h_stride);
    out = parts.take<float>(s.num_tokens * s.choices() * s.hidden);
    num_bytes = parts.used();
  }
};

MoeShape shape_of(const MoeParams& p) {
  return {p.num_tokens, p.hidden, p.width, p.num_experts, p.num_shared, p.top_k};
}

template <int kTokens, int kConsumers>
void moe_tiled(const MoeParams& p, const Launch& launch, const MoeWorkspace& work) {
  const MoeShape shape = shape_of(p);
  const std::int64_t most = moe_most_tiles(shape, kTokens);
  typename SwigluOp<kTokens, kConsumers>::Params up{};
  up.x = static_cast<const Bf16*>(p.x);
  up.weight = static_cast<const Bf16*>(p.w13);
  up.plan = work.plan;
  up.shape = shape;
  up.row_blocks = (p.width + kBlockUnits - 1) / kBlockUnits;
  up.in_dim = p.hidden;
  up.x_row_stride = p.x_row_stride;
  up.h = work.h;
  up.gate_up = static_cast<Bf16*>(p.gate_up);
  up.gammas = p.gammas;
  up.h_stride = work.h_stride;
  moe_swiglu<kTokens, kConsumers>(up, launch, most * up.row_blocks);
  typename DownOp<kTokens, kConsumers>::Params down{};
  down.x = work.h;
  down.weight = static_cast<const Bf16*>(p.w2);
  down.plan = work.plan;
  down.shape = shape;
  down.row_blocks = blocks_of(p.hidden);
  down.in_dim = p.width;
  down.x_row_stride = work.h_stride;
  down.out = work.out;
  down.out_dim = p.hidden;
  down.pairs_of_row = 1;
  moe_down<kTokens, kConsumers>(down, launch, most * down.row_blocks);
}

template <int kTokens, int kConsumers>
void rows_tiled(const DownOp<64, 1>::Params& p, const Launch& launch) {
  typename DownOp<kTokens, kConsumers>::Params params{};
  static_cast<MoeGemmParams&>(params) = p;
  params.out = p.out;
  params.out_dim = p.out_dim;
  params.pairs_of_row = p.pairs_of_row;
  moe_down<kTokens, kConsumers>(params, launch, moe_most_tiles(p.shape, kTokens) * p.row_blocks);
}

}  // namespace

MoePlan take_plan(const MoeShape& shape, Workspace& parts) {
  MoePlan plan{};
  plan.pairs = parts.take<std::int32_t>(shape.num_tokens * shape.top_k);
  plan.offsets = parts.take<std::int32_t>(shape.num_experts + 1);
  plan.tile_begin = parts.take<std::int32_t>(shape.num_groups() + 1);
  return plan;
}

void moe_plan(const char* op, const Launch& launch, const std::int32_t* expert_ids,
              const MoePlan& plan, const MoeShape& shape, int tokens_per_tile) {
  const std::size_t shared =
      static_cast<std::size_t>(mask_words(shape.num_experts) + shape.num_experts) * 4;
  launch_kernel(op, launch, moe_plan_kernel, 1, kPlanThreads, shared,
                PlanParams{expert_ids, plan, shape, tokens_per_tile});
}

std::int64_t moe_most_tiles(const MoeShape& shape, std::int64_t tokens_per_tile) {
  const std::int64_t pairs = shape.num_tokens * shape.top_k;
  return pairs / tokens_per_tile + (pairs < shape.num_experts ? pairs : shape.num_experts) +
         shape.num_shared * ((shape.num_tokens + tokens_per_tile - 1) / tokens_per_tile);
}

// Twice an expert's share, so that most experts are one tile.
int moe_tile_tokens(const MoeShape& s) {
  const std::int64_t share =
      s.num_experts > 0 ? 2 * s.num_tokens * s.top_k / s.num_experts : s.num_tokens;
  const std::int64_t wanted = share < s.num_tokens ? share : s.num_tokens;
  return wanted <= 8 ? 8 : wanted <= 16 ? 16 : wanted <= 32 ? 32 : wanted <= 128 ? 64 : 256;
}

void moe_rows(const DownOp<64, 1>::Params& p, const Launch& launch, int tokens_per_tile) {
  if (tokens_per_tile == 8) return rows_tiled<8, 1>(p, launch);
  if (tokens_per_tile == 16) return rows_tiled<16, 1>(p, launch);
  if (tokens_per_tile == 32) return rows_tiled<32, 1>(p, launch);
  if (tokens_per_tile == 64) return rows_tiled<64, 1>(p, launch);
  rows_tiled<256, 2>(p, launch);
}

void moe_combine(const char* op, const Launch& launch, const float* out, const float* weights,
                 Bf16* y, std::int64_t y_row_stride, const MoeShape& shape) {
  launch_kernel(op, launch, moe_combine_kernel, static_cast<unsigned>(shape.num_tokens),
                kRowThreads, 0,
                CombineParams{out, weights, y, y_row_stride, shape,
                              is_row_aligned(y, y_row_stride) && shape.hidden % 4 == 0});
}

std::size_t moe_workspace_bytes(const MoeParams& p) {
  return MoeWorkspace(shape_of(p), nullptr).num_bytes;
}

void moe(const MoeParams& p, const Launch& launch) {
  if (p.num_tokens == 0 || p.hidden == 0) return;
  const MoeShape shape = shape_of(p);
  if (shape.num_groups() > kPlanThreads)
    throw std::invalid_argument("moe: experts + shared must be at most 1024 on cuda, got " +
                                std::to_string(shape.num_groups()));
  check_workspace("moe", launch, moe_workspace_bytes(p));
  const MoeWorkspace work(shape, launch.workspace);
  const int tokens = moe_tile_tokens(shape);
  moe_plan("moe", launch, p.expert_ids, work.plan, shape, tokens);
  if (tokens == 8)
    moe_tiled<8, 1>(p, launch, work);
  else if (tokens == 16)
    moe_tiled<16, 1>(p, launch, work);
  else if (tokens == 32)
    moe_tiled<32, 1>(p, launch, work);
  else if (tokens == 64)
    moe_tiled<64, 1>(p, launch, work);
  else
    moe_tiled<256, 2>(p, launch, work);
  moe_combine("moe", launch, work.out, p.weights, static_cast<Bf16*>(p.y), p.y_row_stride, shape);
}

void pack_experts(const PackExpertsParams& p, const Launch& launch) {
  if (p.num_matrices == 0) return;
  launch_kernel("pack_experts", launch, pack_experts_kernel,
                static_cast<unsigned>(launch.num_sms) * 8, kPackThreads, 0, p);
}

}  // namespace tml::cuda
