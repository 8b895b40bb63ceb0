// linear_wgrad on the device: the product of linear with both operands turned over (tokens are the
// depth), the x of a layer as the weight operand and its dy as the token rows. A chain of tokens is
// one accumulator; it starts at a new k block, so that its end is a block's end, and the zeros that
// fill its last block change nothing. Kernels are instantiated in csrc/cuda/gemm.
#pragma once

#include "cuda/linear.h"
#include "ops/linear_train.h"

namespace tml::cuda {

template <class Y, int kTokens, int kConsumers>
struct WgradOp : LinearOp<Y, kTokens, kConsumers> {
  using Linear = LinearOp<Y, kTokens, kConsumers>;
  struct Params : Linear::Params {
    const float* onto;  // what the chains are added to, rows onto_row_stride apart; null: zeros
    std::int64_t onto_row_stride;
    int blocks_of_chain;
  };
  static constexpr bool kPromotes = true;

  static TML_DEVICE int chain_blocks(const Params& p) { return p.blocks_of_chain; }
  static TML_DEVICE void start(const Params& p, const GemmTile& tile, int consumer,
                               float (&total)[kTokens / 2]) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const std::int64_t first =
        (tile.row_block + consumer) * kBlockRows + threadIdx.x % 128 / 32 * 16;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int token = fragment_column(lane, i);
      const std::int64_t row = first + fragment_row(lane, i);
      const bool is_read = p.onto != nullptr && token < tile.num_tokens && row < p.out_dim;
      total[i] = is_read ? p.onto[(tile.token_begin + token) * p.onto_row_stride + row] : 0.0f;
    }
  }
};

inline constexpr int kWgradTokens = 128, kWgradConsumers = 2;

template <class Y>
using WgradKernel = WgradOp<Y, kWgradTokens, kWgradConsumers>;

template <class Y>
void launch_wgrad(const char* op, const typename WgradKernel<Y>::Params& params,
                  const Launch& launch) {
  launch_gemm<WgradKernel<Y>, kWgradTokens, kWgradConsumers>(op, launch, params,
                                                             WgradKernel<Y>::num_tiles(params));
}
extern template void launch_wgrad<float>(const char*, const WgradKernel<float>::Params&,
                                         const Launch&);
extern template void launch_wgrad<Bf16>(const char*, const WgradKernel<Bf16>::Params&,
                                        const Launch&);

// A [num_rows, num_columns] matrix turned over, its rows (the depth of the product) cut into
// chains.
struct TurnParams {
  const Bf16* x;
  Bf16* out;
  std::int64_t row_stride, num_rows, num_columns;
  std::int64_t chain;  // rows of one chain
  bool is_aligned;     // sixteen bytes at a time may be read
  // Matrices one after the other, in x num_rows * row_stride elements apart.
  std::int64_t num_matrices;
};
TML_HOST_DEVICE std::int64_t turned_blocks(std::int64_t num_rows, std::int64_t chain) {
  const std::int64_t whole = num_rows / chain;
  return whole * blocks_of(chain) + blocks_of(num_rows - whole * chain);
}
// As a weight [num_columns, depth] in blocks, or as dense rows of turned_blocks(...) * 64.
void turn_into_weight(const char* op, const TurnParams& p, const Launch& launch);
void turn_into_rows(const char* op, const TurnParams& p, const Launch& launch);
TurnParams turned(const void* x, std::int64_t row_stride, std::int64_t num_rows,
                  std::int64_t num_columns, std::int64_t chain, Bf16* out);

// dw of chains of `chain` tokens, added to `onto` (null: zeros), which may be dw.
struct ChainedWgrad {
  LinearWgradParams op;
  std::int64_t chain;
  const float* onto;
  std::int64_t onto_row_stride;
};
struct WgradWork {
  Bf16* weight;
  Bf16* rows;
  WgradWork(const LinearWgradParams& p, std::int64_t chain, Workspace& parts) {
    const std::int64_t depth = turned_blocks(p.num_tokens, chain) * kBlockDepth;
    weight = parts.take<Bf16>(blocks_of(p.in_dim) * kBlockRows * depth);
    rows = parts.take<Bf16>(p.out_dim * depth);
  }
};
void chained_wgrad(const char* op, const ChainedWgrad& p, const WgradWork& work,
                   const Launch& launch);

}  // namespace tml::cuda
