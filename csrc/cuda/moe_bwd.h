// The weight gradients of experts: linear_wgrad's product for each, over the tokens that chose it.
// The k blocks (64 tokens) of all groups follow one another, tile_begin of a plan of 64 tokens a
// tile saying where each group's begin; a chain of kGradBlock tokens is eight of them.
#pragma once

#include "cuda/moe.h"
#include "cuda/wgrad.h"

namespace tml::cuda {

struct MoeWgradOp : LinearOp<Bf16, kWgradTokens, kWgradConsumers> {
  using Linear = LinearOp<Bf16, kWgradTokens, kWgradConsumers>;
  // Of one group: y [num_tokens, out_dim], its rows those of x [num_tokens, tokens of the group].
  struct Params : Linear::Params {
    const std::int32_t* block_begin;  // [num_groups + 1]
    std::int32_t num_groups;
  };
  static constexpr bool kPromotes = true;

  static TML_HOST_DEVICE int num_tiles(const Params& p) {
    return p.num_groups * Linear::num_tiles(p);
  }
  static TML_HOST_DEVICE GemmTile tile(const Params& p, int i) {
    const int of_group = Linear::num_tiles(p);
    GemmTile out = Linear::tile(p, i % of_group);
    out.group = i / of_group;
    const std::int64_t begin = p.block_begin[out.group];
    const std::int64_t blocks = p.block_begin[out.group + 1] - begin;
    out.weight =
        p.weight + (begin * blocks_of(p.out_dim) + out.row_block * blocks) * kBlockElements;
    return out;
  }
  static TML_HOST_DEVICE std::int64_t depth(const Params& p, const GemmTile& tile) {
    return (p.block_begin[tile.group + 1] - p.block_begin[tile.group]) * kBlockDepth;
  }
  static TML_DEVICE const Bf16* token_row(const Params& p, const GemmTile& tile, int row) {
    return p.x + p.block_begin[tile.group] * kBlockDepth * p.num_tokens +
           (tile.token_begin + row) * depth(p, tile);
  }
  static TML_DEVICE int chain_blocks(const Params&) { return contract::kGradBlock / kBlockDepth; }
  static TML_DEVICE void start(const Params&, const GemmTile&, int,
                               float (&total)[kWgradTokens / 2]) {
#pragma unroll
    for (int i = 0; i < kWgradTokens / 2; ++i) total[i] = 0.0f;
  }
  static TML_DEVICE void store(const Params& p, const GemmTile& tile, int consumer,
                               const float (&total)[kWgradTokens / 2]) {
    typename Linear::Params own = p;
    own.y += tile.group * p.num_tokens * p.out_dim;
    Linear::store(own, tile, consumer, total);
  }
};

void launch_moe_wgrad(const MoeWgradOp::Params& params, const Launch& launch);

}  // namespace tml::cuda
