// linear_plain, linear_dgrad, linear_wgrad: the products of linear on matrices as they lie, which
// are brought into its layouts first. A block turns 64 x 64 elements over in shared memory.
#include "cuda/cuda.h"
#include "cuda/wgrad.h"

namespace tml::cuda {
namespace {

constexpr int kTurnThreads = 256;
constexpr int kTurnPitch = 72;  // of a row in shared memory: sixteen-byte aligned

template <bool kIntoWeight>
TML_KERNEL(kTurnThreads, 4)
turn_kernel(const TML_GRID_CONSTANT TurnParams p) {
  grid_launch_dependents();
  grid_wait();
  auto* const tile = reinterpret_cast<Bf16*>(shared_memory());
  const std::int64_t k_blocks = turned_blocks(p.num_rows, p.chain);
  const std::int64_t row_blocks = blocks_of(p.num_columns), block = blockIdx.x / k_blocks;
  const std::int64_t matrix = block / row_blocks, first = block % row_blocks * kBlockRows;
  const std::int64_t k_block = blockIdx.x % k_blocks;
  const Bf16* const x = p.x + matrix * p.num_rows * p.row_stride;
  Bf16* const out = p.out + matrix * k_blocks * kBlockDepth *
                                (kIntoWeight ? row_blocks * kBlockRows : p.num_columns);
  const std::int64_t chain_blocks = blocks_of(p.chain), chain = k_block / chain_blocks;
  const std::int64_t in_chain = k_block % chain_blocks * kBlockDepth;
  for (int i = static_cast<int>(threadIdx.x); i < kBlockDepth * 8; i += kTurnThreads) {
    const int row = i / 8, column = i % 8 * 8;
    const std::int64_t source = chain * p.chain + in_chain + row;
    const bool is_row = in_chain + row < p.chain && source < p.num_rows;
    const std::int64_t left = is_row ? p.num_columns - first - column : 0;
    const Bf16* const from = x + source * p.row_stride + first + column;
    Bf16* const to = tile + row * kTurnPitch + column;
    if (p.is_aligned && left >= 8) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) to[j] = j < left ? from[j] : Bf16{0};
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kBlockRows * 8; i += kTurnThreads) {
    // Neighbouring threads write what lies side by side: rows of a core tile, or k of a row.
    const int column = kIntoWeight ? i % kBlockRows : i / 8;
    const int k = (kIntoWeight ? i / kBlockRows : i % 8) * 8;
    alignas(16) Bf16 chunk[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) chunk[j] = tile[(k + j) * kTurnPitch + column];
    const std::int64_t n = first + column, depth = k_block * kBlockDepth + k;
    if (!kIntoWeight && n >= p.num_columns) continue;
    Bf16* const to = out + (kIntoWeight ? weight_offset(n, depth, k_blocks)
                                        : n * k_blocks * kBlockDepth + depth);
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(chunk);
  }
}

template <bool kIntoWeight>
void turn(const char* op, const TurnParams& p, const Launch& launch) {
  const std::int64_t blocks =
      p.num_matrices * turned_blocks(p.num_rows, p.chain) * blocks_of(p.num_columns);
  if (blocks == 0) return;
  launch_kernel(op, launch, turn_kernel<kIntoWeight>, static_cast<unsigned>(blocks), kTurnThreads,
                kBlockDepth * kTurnPitch * sizeof(Bf16), p);
}

template <class Y>
void wgrad_typed(const char* op, const ChainedWgrad& p, const WgradWork& work,
                 const Launch& launch) {
  const std::int64_t depth = turned_blocks(p.op.num_tokens, p.chain) * kBlockDepth;
  const LinearParams product{work.rows,          work.weight,   p.op.dw, depth,
                             p.op.dw_row_stride, p.op.out_dim,  depth,   p.op.in_dim,
                             DType::kBf16,       p.op.dw_dtype, 0};
  auto params = linear_operands<typename WgradKernel<Y>::Params>(product, false);
  params.onto = p.onto;
  params.onto_row_stride = p.onto_row_stride;
  params.blocks_of_chain = static_cast<int>(blocks_of(p.chain));
  launch_wgrad<Y>(op, params, launch);
}

Bf16* weight_part(std::int64_t out_dim, std::int64_t in_dim, void* workspace, std::size_t* bytes) {
  Workspace parts(workspace);
  Bf16* const out = parts.take<Bf16>(packed_elements(out_dim, in_dim));
  *bytes = parts.used();
  return out;
}

}  // namespace

void turn_into_weight(const char* op, const TurnParams& p, const Launch& launch) {
  turn<true>(op, p, launch);
}
void turn_into_rows(const char* op, const TurnParams& p, const Launch& launch) {
  turn<false>(op, p, launch);
}
TurnParams turned(const void* x, std::int64_t row_stride, std::int64_t num_rows,
                  std::int64_t num_columns, std::int64_t chain, Bf16* out) {
  return {static_cast<const Bf16*>(x),
          out,
          row_stride,
          num_rows,
          num_columns,
          chain,
          row_stride % 8 == 0 && reinterpret_cast<std::uintptr_t>(x) % 16 == 0,
          1};
}

void chained_wgrad(const char* op, const ChainedWgrad& p, const WgradWork& work,
                   const Launch& launch) {
  const LinearWgradParams& g = p.op;
  turn_into_weight(op, turned(g.x, g.x_row_stride, g.num_tokens, g.in_dim, p.chain, work.weight),
                   launch);
  turn_into_rows(op, turned(g.dy, g.dy_row_stride, g.num_tokens, g.out_dim, p.chain, work.rows),
                 launch);
  if (g.dw_dtype == DType::kF32) return wgrad_typed<float>(op, p, work, launch);
  wgrad_typed<Bf16>(op, p, work, launch);
}

std::size_t linear_plain_workspace_bytes(const LinearPlainParams& p) {
  std::size_t bytes = 0;
  weight_part(p.out_dim, p.in_dim, nullptr, &bytes);
  return bytes;
}

void linear_plain(const LinearPlainParams& p, const Launch& launch) {
  if (p.num_tokens == 0 || p.out_dim == 0) return;
  std::size_t bytes = 0;
  Bf16* const weight = weight_part(p.out_dim, p.in_dim, launch.workspace, &bytes);
  check_workspace("linear_plain", launch, bytes);
  pack_weight({p.w, weight, p.w_row_stride, p.out_dim, p.in_dim, DType::kBf16, 0}, launch);
  linear_of_fresh({p.x, weight, p.y, p.x_row_stride, p.y_row_stride, p.num_tokens, p.in_dim,
                   p.out_dim, DType::kBf16, p.y_dtype, 0},
                  launch);
}

std::size_t linear_dgrad_workspace_bytes(const LinearDgradParams& p) {
  std::size_t bytes = 0;
  weight_part(p.in_dim, p.out_dim, nullptr, &bytes);
  return bytes;
}

void linear_dgrad(const LinearDgradParams& p, const Launch& launch) {
  if (p.num_tokens == 0 || p.in_dim == 0) return;
  std::size_t bytes = 0;
  Bf16* const weight = weight_part(p.in_dim, p.out_dim, launch.workspace, &bytes);
  check_workspace("linear_dgrad", launch, bytes);
  turn_into_weight("linear_dgrad",
                   turned(p.w, p.w_row_stride, p.out_dim, p.in_dim, p.out_dim, weight), launch);
  linear_of_fresh({p.dy, weight, p.dx, p.dy_row_stride, p.dx_row_stride, p.num_tokens, p.out_dim,
                   p.in_dim, DType::kBf16, p.dx_dtype, 0},
                  launch);
}

std::size_t linear_wgrad_workspace_bytes(const LinearWgradParams& p) {
  Workspace parts(nullptr);
  WgradWork(p, contract::kGradBlock, parts);
  return parts.used();
}

void linear_wgrad(const LinearWgradParams& p, const Launch& launch) {
  if (p.in_dim == 0 || p.out_dim == 0) return;
  Workspace parts(launch.workspace);
  const WgradWork work(p, contract::kGradBlock, parts);
  check_workspace("linear_wgrad", launch, parts.used());
  chained_wgrad("linear_wgrad", {p, contract::kGradBlock, nullptr, 0}, work, launch);
}

}  // namespace tml::cuda
