// moe_bwd: u = W2^T dy and the terms of dx are the forward's product with weights turned over;
// between them sixteen threads take a (token, choice). For the weight gradients the rows of each
// expert's tokens are gathered and turned over, then multiplied expert by expert.
#include "cuda/cuda.h"
#include "cuda/moe_bwd.h"
#include "cuda/norm_bwd.h"

namespace tml::cuda {
namespace {

constexpr int kTurnThreads = 256;
constexpr int kTurnPitch = 72;  // of a row in shared memory: sixteen-byte aligned

struct Work {
  MoePlan plan, blocks;  // tiles of the products; k blocks of the weight gradients
  std::int64_t g_stride, a_stride;
  float* u;      // [pairs, width]
  Bf16* g;       // [pairs, g_stride]: d gate | d up
  Bf16* a;       // [pairs, a_stride]: s a
  Bf16* turned;  // W2^T, then W13^T, of every expert
  float* terms;  // [pairs, hidden]
  Bf16* weight;  // of a weight gradient: x or s a, turned over
  Bf16* rows;    // d gate | d up or dy, turned over
  std::size_t num_bytes;

  Work(const MoeBwdParams& p, const MoeShape& s, void* base)
      : g_stride((2 * s.width + 7) / 8 * 8), a_stride((s.width + 7) / 8 * 8) {
    Workspace parts(base);
    const std::int64_t pairs = s.num_tokens * s.choices();
    plan = take_plan(s, parts);
    blocks = take_plan(s, parts);
    u = parts.take<float>(pairs * s.width);
    g = parts.take<Bf16>(pairs * g_stride);
    a = parts.take<Bf16>(pairs * a_stride);
    const std::int64_t w2 = packed_elements(s.width, s.hidden);
    const std::int64_t w13 = p.dx == nullptr ? 0 : packed_elements(s.hidden, 2 * s.width);
    turned = parts.take<Bf16>(s.num_groups() * (w2 > w13 ? w2 : w13));
    terms = parts.take<float>(p.dx == nullptr ? 0 : pairs * s.hidden);
    const std::int64_t depth = p.dw13 == nullptr ? 0 : moe_most_tiles(s, kBlockDepth) * kBlockDepth;
    weight =
        parts.take<Bf16>(depth * blocks_of(s.hidden > s.width ? s.hidden : s.width) * kBlockRows);
    rows = parts.take<Bf16>(depth * (s.hidden > 2 * s.width ? s.hidden : 2 * s.width));
    num_bytes = parts.used();
  }
};

struct PairParams {
  const float* u;
  const Bf16* gate_up;  // [pairs, 2 width]
  const float* weights;
  const float* gammas;
  Bf16* g;
  Bf16* a;
  float* dweights;
  float* dgammas;
  std::int64_t g_stride, a_stride;
  MoeShape shape;
};

TML_KERNEL(kRowThreads, 4) moe_pairs_kernel(const TML_GRID_CONSTANT PairParams p) {
  grid_launch_dependents();
  grid_wait();
  const std::int64_t pairs = p.shape.num_tokens * p.shape.choices(), width = p.shape.width;
  const bool is_pair = own_row() < pairs;
  const std::int64_t pair = is_pair ? own_row() : pairs - 1;
  const std::int64_t token = pair / p.shape.choices();
  const auto choice = static_cast<std::int32_t>(pair % p.shape.choices());
  const bool is_shared = choice >= p.shape.top_k;
  const std::int64_t at = is_shared ? token * p.shape.num_shared + choice - p.shape.top_k
                                    : token * p.shape.top_k + choice;
  const float scale = is_shared ? p.gammas[at] : p.weights[at];
  const Bf16* const saved = p.gate_up + pair * 2 * width;
  float dots = 0.0f;
#pragma unroll 2
  for (std::int64_t i = lane_of_row(); i < width; i += contract::kLanes) {
    const float gate = as_float(saved[i]), up = as_float(saved[width + i]);
    const float u = p.u[pair * width + i];
    const float denominator = __fadd_rn(1.0f, exp_poly(-gate));
    const float sig = __fdiv_rn(1.0f, denominator), act = __fdiv_rn(gate, denominator);
    const float a = __fmul_rn(act, up), du = __fmul_rn(scale, u);
    dots = __fmaf_rn(u, is_shared ? a : round_to_bf16(a), dots);
    if (!is_pair) continue;
    put(p.g + pair * p.g_stride + i,
        __fmul_rn(__fmul_rn(du, up), __fmaf_rn(act, __fadd_rn(1.0f, -sig), sig)));
    put(p.g + pair * p.g_stride + width + i, __fmul_rn(du, act));
    put(p.a + pair * p.a_stride + i, __fmul_rn(scale, a));
  }
  dots = lanes_sum(dots);
  if (is_pair && lane_of_row() == 0) (is_shared ? p.dgammas : p.dweights)[at] = dots;
}

// Rows of x (one to pairs_of_row pairs) of each group's tokens, turned over: as a weight
// [num_columns, tokens of the group], or as rows.
struct GatherParams {
  const Bf16* x;
  Bf16* out;
  std::int64_t row_stride, num_columns;
  std::int32_t pairs_of_row;
  MoePlan blocks;
  MoeShape shape;
};

template <bool kIntoWeight>
TML_KERNEL(kTurnThreads, 4)
moe_turn_kernel(const TML_GRID_CONSTANT GatherParams p) {
  grid_launch_dependents();
  grid_wait();
  auto* const tile = reinterpret_cast<Bf16*>(shared_memory());
  const std::int64_t row_blocks = blocks_of(p.num_columns);
  const auto block = static_cast<std::int32_t>(blockIdx.x / row_blocks);
  const std::int64_t first = blockIdx.x % row_blocks * kBlockRows;
  const std::int32_t groups = p.shape.num_groups();
  const std::int32_t* const begins = p.blocks.tile_begin;
  if (block >= begins[groups]) return;
  const std::int32_t group = group_of_tile(begins, groups, block);
  const std::int32_t begin = begins[group], k_blocks = begins[group + 1] - begin;
  const bool is_shared = group >= p.shape.num_experts;
  const std::int64_t offset = is_shared ? 0 : p.blocks.offsets[group];
  const std::int64_t tokens = is_shared ? p.shape.num_tokens : p.blocks.offsets[group + 1] - offset;
  const std::int64_t in_group = static_cast<std::int64_t>(block - begin) * kBlockDepth;
  for (int i = static_cast<int>(threadIdx.x); i < kBlockDepth * kBlockRows; i += kTurnThreads) {
    const int row = i / kBlockRows, column = i % kBlockRows;
    Bf16 value = 0;
    if (in_group + row < tokens && first + column < p.num_columns) {
      const std::int64_t pair = is_shared ? (in_group + row) * p.shape.choices() + p.shape.top_k +
                                                group - p.shape.num_experts
                                          : p.blocks.pairs[offset + in_group + row];
      value = p.x[pair / p.pairs_of_row * p.row_stride + first + column];
    }
    tile[row * kTurnPitch + column] = value;
  }
  __syncthreads();
  Bf16* const out = p.out + static_cast<std::int64_t>(begin) * kBlockDepth *
                                (kIntoWeight ? row_blocks * kBlockRows : p.num_columns);
  for (int i = static_cast<int>(threadIdx.x); i < kBlockRows * 8; i += kTurnThreads) {
    const int column = kIntoWeight ? i % kBlockRows : i / 8;
    const int k = (kIntoWeight ? i / kBlockRows : i % 8) * 8;
    alignas(16) Bf16 chunk[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) chunk[j] = tile[(k + j) * kTurnPitch + column];
    const std::int64_t n = first + column, depth = in_group + k;
    if (!kIntoWeight && n >= p.num_columns) continue;
    Bf16* const to = out + (kIntoWeight ? weight_offset(n, depth, k_blocks)
                                        : n * k_blocks * kBlockDepth + depth);
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(chunk);
  }
}

template <bool kIntoWeight>
void gather(const GatherParams& p, const Launch& launch) {
  const std::int64_t blocks = moe_most_tiles(p.shape, kBlockDepth) * blocks_of(p.num_columns);
  launch_kernel("moe_bwd", launch, moe_turn_kernel<kIntoWeight>, static_cast<unsigned>(blocks),
                kTurnThreads, kBlockDepth * kTurnPitch * sizeof(Bf16), p);
}

// dw[group] = sum over its tokens of left^T right: [left columns, right columns].
void weight_grad(const Work& work, GatherParams left, GatherParams right, void* dw,
                 const Launch& launch) {
  left.out = work.rows;
  right.out = work.weight;
  gather<false>(left, launch);
  gather<true>(right, launch);
  const LinearParams product{work.rows,         work.weight,      dw, 0,
                             right.num_columns, left.num_columns, 0,  right.num_columns,
                             DType::kBf16,      DType::kBf16,     0};
  auto params = linear_operands<MoeWgradOp::Params>(product, false);
  params.pairs_are_aligned = params.pairs_are_aligned && right.num_columns % 2 == 0;
  params.block_begin = work.blocks.tile_begin;
  params.num_groups = left.shape.num_groups();
  launch_moe_wgrad(params, launch);
}

TurnParams turned_experts(const void* w, std::int64_t rows, std::int64_t columns, Bf16* out,
                          std::int64_t num_matrices) {
  TurnParams params = turned(w, columns, rows, columns, rows, out);
  params.num_matrices = num_matrices;
  return params;
}

MoeShape shape_of(const MoeBwdParams& p) {
  return {p.num_tokens, p.hidden, p.width, p.num_experts, p.num_shared, p.top_k};
}

}  // namespace

std::size_t moe_bwd_workspace_bytes(const MoeBwdParams& p) {
  return Work(p, shape_of(p), nullptr).num_bytes;
}

void moe_bwd(const MoeBwdParams& p, const Launch& launch) {
  constexpr const char* kOp = "moe_bwd";
  const MoeShape shape = shape_of(p);
  const std::int64_t weights = shape.num_groups() * p.hidden * p.width;
  if (weights == 0) return;
  if (p.num_tokens == 0) {
    if (p.dw13 == nullptr) return;
    fold_blocks(kOp, launch, nullptr, 0, 2 * weights, p.dw13, DType::kBf16);
    fold_blocks(kOp, launch, nullptr, 0, weights, p.dw2, DType::kBf16);
    return;
  }
  if (shape.num_groups() > 1024)
    throw std::invalid_argument("moe_bwd: experts + shared must be at most 1024 on cuda, got " +
                                std::to_string(shape.num_groups()));
  const Work work(p, shape, launch.workspace);
  check_workspace(kOp, launch, work.num_bytes);
  const int tokens = moe_tile_tokens(shape);
  moe_plan(kOp, launch, p.expert_ids, work.plan, shape, tokens);
  moe_plan(kOp, launch, p.expert_ids, work.blocks, shape, kBlockDepth);

  turn_into_weight(kOp, turned_experts(p.w2, p.hidden, p.width, work.turned, shape.num_groups()),
                   launch);
  DownOp<64, 1>::Params product{};
  product.x = static_cast<const Bf16*>(p.dy);
  product.weight = work.turned;
  product.plan = work.plan;
  product.shape = shape;
  product.row_blocks = blocks_of(p.width);
  product.in_dim = p.hidden;
  product.x_row_stride = p.dy_row_stride;
  product.out = work.u;
  product.out_dim = p.width;
  product.pairs_of_row = shape.choices();
  moe_rows(product, launch, tokens);

  const std::int64_t pairs = p.num_tokens * shape.choices();
  launch_kernel(kOp, launch, moe_pairs_kernel, blocks_for(pairs, kGradRows), kRowThreads, 0,
                PairParams{work.u, static_cast<const Bf16*>(p.gate_up), p.weights, p.gammas, work.g,
                           work.a, p.dweights, p.dgammas, work.g_stride, work.a_stride, shape});

  if (p.dx != nullptr) {
    turn_into_weight(
        kOp, turned_experts(p.w13, 2 * p.width, p.hidden, work.turned, shape.num_groups()), launch);
    product.x = work.g;
    product.row_blocks = blocks_of(p.hidden);
    product.in_dim = 2 * p.width;
    product.x_row_stride = work.g_stride;
    product.out = work.terms;
    product.out_dim = p.hidden;
    product.pairs_of_row = 1;
    moe_rows(product, launch, tokens);
    moe_combine(kOp, launch, work.terms, nullptr, static_cast<Bf16*>(p.dx), p.hidden, shape);
  }
  if (p.dw13 == nullptr) return;
  const auto of_tokens = [&](const void* x, std::int64_t stride) {
    return GatherParams{static_cast<const Bf16*>(x),
                        nullptr,
                        stride,
                        p.hidden,
                        shape.choices(),
                        work.blocks,
                        shape};
  };
  const auto of_pairs = [&](const Bf16* x, std::int64_t stride, std::int64_t columns) {
    return GatherParams{x, nullptr, stride, columns, 1, work.blocks, shape};
  };
  weight_grad(work, of_pairs(work.g, work.g_stride, 2 * p.width), of_tokens(p.x, p.x_row_stride),
              p.dw13, launch);
  weight_grad(work, of_tokens(p.dy, p.dy_row_stride), of_pairs(work.a, work.a_stride, p.width),
              p.dw2, launch);
}

}  // namespace tml::cuda
