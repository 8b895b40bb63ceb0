// moe on the device, four kernels: a plan (whose tokens does each expert take), gate and up with
// SwiGLU, down, combine. The two products are gemm_kernel over tiles (group, 64 weight rows,
// tokens), a group being an expert or a shared one; the rows of a token's experts are gathered as
// they are loaded and stay where (token, choice) puts them, so nothing is sorted, aligned or moved.
#pragma once

#include "cuda/gemm.h"
#include "ops/moe.h"

namespace tml::cuda {

// A (token, choice): token * (top_k + num_shared) + choice; shared experts are the last choices.
struct MoePlan {
  std::int32_t* pairs;       // [num_tokens * top_k] by expert, tokens ascending
  std::int32_t* offsets;     // [num_experts + 1] into pairs
  std::int32_t* tile_begin;  // [num_experts + num_shared + 1] token tiles before each group
};

struct MoeShape {
  std::int64_t num_tokens, hidden, width;
  std::int32_t num_experts, num_shared, top_k;
  TML_HOST_DEVICE std::int32_t choices() const { return top_k + num_shared; }
  TML_HOST_DEVICE std::int32_t num_groups() const { return num_experts + num_shared; }
};

// The group of token tile i: the last whose first tile is at or before it.
TML_HOST_DEVICE std::int32_t group_of_tile(const std::int32_t* tile_begin, std::int32_t num_groups,
                                           std::int64_t i) {
  std::int32_t low = 0, high = num_groups - 1;
  while (low < high) {
    const std::int32_t middle = (low + high + 1) / 2;
    if (tile_begin[middle] <= i)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// What both products share: tiles in the order group, weight rows, tokens, so that token tiles of
// the same weights follow each other.
struct MoeGemmParams {
  const Bf16* x;
  const Bf16* weight;  // [groups][row blocks][k blocks]
  MoePlan plan;
  MoeShape shape;
  std::int64_t row_blocks;  // of one group
  std::int64_t in_dim;
  std::int64_t x_row_stride;
};

template <int kTokens, int kConsumers>
struct MoeTiles {
  static constexpr bool kPromotes = false;

  static TML_HOST_DEVICE bool weights_are_static(const MoeGemmParams&) { return false; }
  static TML_HOST_DEVICE std::int64_t depth(const MoeGemmParams& p, const GemmTile&) {
    return p.in_dim;
  }
  static TML_HOST_DEVICE int row_steps(const MoeGemmParams& p) {
    return static_cast<int>((p.row_blocks + kConsumers - 1) / kConsumers);
  }
  static TML_HOST_DEVICE int num_tiles(const MoeGemmParams& p) {
    return p.plan.tile_begin[p.shape.num_groups()] * row_steps(p);
  }
  static TML_HOST_DEVICE GemmTile tile(const MoeGemmParams& p, int i) {
    const int steps = row_steps(p);
    // Group g has steps * (its token tiles) tiles: the token tile index is found before dividing.
    const std::int32_t g = group_of_tile(p.plan.tile_begin, p.shape.num_groups(), i / steps);
    const std::int32_t first = p.plan.tile_begin[g];
    const std::int32_t columns = p.plan.tile_begin[g + 1] - first;
    const int within = i - first * steps;
    const std::int64_t block = static_cast<std::int64_t>(within / columns) * kConsumers;
    const std::int32_t begin = within % columns * kTokens;
    const bool is_shared = g >= p.shape.num_experts;
    const std::int64_t tokens =
        is_shared ? p.shape.num_tokens : p.plan.offsets[g + 1] - p.plan.offsets[g];
    const std::int64_t left = tokens - begin, blocks = p.row_blocks - block;
    return {p.weight + (g * p.row_blocks + block) * blocks_of(p.in_dim) * kBlockElements,
            block,
            static_cast<std::int32_t>(blocks < kConsumers ? blocks : kConsumers),
            begin,
            static_cast<std::int32_t>(left < kTokens ? left : kTokens),
            g};
  }
  static TML_HOST_DEVICE std::int32_t pair_of(const MoeGemmParams& p, const GemmTile& tile,
                                              int row) {
    if (tile.group < p.shape.num_experts)
      return p.plan.pairs[p.plan.offsets[tile.group] + tile.token_begin + row];
    return (tile.token_begin + row) * p.shape.choices() + p.shape.top_k + tile.group -
           p.shape.num_experts;
  }
};

// h[pair] = round(silu(gate) * up [* gamma]); gate and up of a pair are kept if asked for.
template <int kTokens, int kConsumers>
struct SwigluOp : MoeTiles<kTokens, kConsumers> {
  using Tiles = MoeTiles<kTokens, kConsumers>;
  struct Params : MoeGemmParams {
    Bf16* h;
    Bf16* gate_up;  // or null
    const float* gammas;
    std::int64_t h_stride;  // even
  };
  static TML_DEVICE const Bf16* any_row(const Params& p) { return p.x; }
  static TML_DEVICE const Bf16* token_row(const Params& p, const GemmTile& tile, int row) {
    return p.x + Tiles::pair_of(p, tile, row) / p.shape.choices() * p.x_row_stride;
  }
  static TML_DEVICE void store(const Params& p, const GemmTile& tile, int consumer,
                               const float (&d)[kTokens / 2]) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const bool is_shared = tile.group >= p.shape.num_experts;
    const std::int64_t first =
        (tile.row_block + consumer) * kBlockUnits + threadIdx.x % 128 / 32 * 8;
    const auto gamma_of = [&](int token) {
      if (!is_shared || token >= tile.num_tokens) return 1.0f;
      return p.gammas[static_cast<std::int64_t>(tile.token_begin + token) * p.shape.num_shared +
                      tile.group - p.shape.num_experts];
    };
#pragma unroll
    for (int i = 0; i < kTokens / 2; i += 4) {
      float value[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        value[j] = __fmul_rn(silu(d[i + j]), d[i + 2 + j]);
        if (is_shared) value[j] = __fmul_rn(value[j], gamma_of(i * 2 + lane % 4 * 2 + j));
      }
      const auto put = [&](Bf16* rows, std::int64_t stride, std::int64_t offset, float a, float b) {
        emit_transposed(pack_bf16(a, b), i * 2, [&](int token, int r, std::uint32_t pair) {
          if (token >= tile.num_tokens) return;
          Bf16* const row = rows + Tiles::pair_of(p, tile, token) * stride + offset;
          store_pair(row, first + r, p.shape.width, pair,
                     (reinterpret_cast<std::uintptr_t>(row) & 3) == 0);
        });
      };
      put(p.h, p.h_stride, 0, value[0], value[1]);
      if (p.gate_up != nullptr) {
        put(p.gate_up, 2 * p.shape.width, 0, d[i], d[i + 1]);
        put(p.gate_up, 2 * p.shape.width, p.shape.width, d[i + 2], d[i + 3]);
      }
    }
  }
};

// out[pair] = W row, fp32, where row is pair / pairs_of_row of x: W2 h[pair] in the forward pass.
template <int kTokens, int kConsumers>
struct DownOp : MoeTiles<kTokens, kConsumers> {
  using Tiles = MoeTiles<kTokens, kConsumers>;
  struct Params : MoeGemmParams {
    float* out;
    std::int64_t out_dim;
    std::int32_t pairs_of_row;
  };
  static TML_DEVICE const Bf16* any_row(const Params& p) { return p.x; }
  static TML_DEVICE const Bf16* token_row(const Params& p, const GemmTile& tile, int row) {
    return p.x + Tiles::pair_of(p, tile, row) / p.pairs_of_row * p.x_row_stride;
  }
  static TML_DEVICE void store(const Params& p, const GemmTile& tile, int consumer,
                               const float (&d)[kTokens / 2]) {
    const std::int64_t first = (tile.row_block + consumer) * kBlockRows;
    each_value<kTokens>(d, [&](int token, int row, float value) {
      if (token < tile.num_tokens && first + row < p.out_dim)
        p.out[Tiles::pair_of(p, tile, token) * p.out_dim + first + row] = value;
    });
  }
};

template <int kTokens, int kConsumers>
void moe_swiglu(const typename SwigluOp<kTokens, kConsumers>::Params& params, const Launch& launch,
                std::int64_t max_tiles) {
  launch_gemm<SwigluOp<kTokens, kConsumers>, kTokens, kConsumers>("moe", launch, params, max_tiles);
}
template <int kTokens, int kConsumers>
void moe_down(const typename DownOp<kTokens, kConsumers>::Params& params, const Launch& launch,
              std::int64_t max_tiles) {
  launch_gemm<DownOp<kTokens, kConsumers>, kTokens, kConsumers>("moe", launch, params, max_tiles);
}

#define TML_EACH_MOE(X) X(8, 1) X(16, 1) X(32, 1) X(64, 1) X(256, 2)
#define TML_DECLARE_MOE(n, c)                                                         \
  extern template void moe_swiglu<n, c>(const SwigluOp<n, c>::Params&, const Launch&, \
                                        std::int64_t);                                \
  extern template void moe_down<n, c>(const DownOp<n, c>::Params&, const Launch&, std::int64_t);
TML_EACH_MOE(TML_DECLARE_MOE)
#undef TML_DECLARE_MOE

// What forward and backward share. tile_begin of the plan counts tiles of `tokens_per_tile`.
void moe_plan(const char* op, const Launch& launch, const std::int32_t* expert_ids,
              const MoePlan& plan, const MoeShape& shape, int tokens_per_tile);
// Tokens a tile of a product should hold, and no more such tiles than this, whatever the routing.
int moe_tile_tokens(const MoeShape& shape);
std::int64_t moe_most_tiles(const MoeShape& shape, std::int64_t tokens_per_tile);
// y[token] = sum of out[token, choice] over ascending choices from 0, each times its weight (fma)
// where it is routed and weights is not null; one rounding.
void moe_combine(const char* op, const Launch& launch, const float* out, const float* weights,
                 Bf16* y, std::int64_t y_row_stride, const MoeShape& shape);
// The parts of a plan, and moe_down at any of its tiles.
MoePlan take_plan(const MoeShape& shape, Workspace& parts);
void moe_rows(const DownOp<64, 1>::Params& params, const Launch& launch, int tokens_per_tile);

}  // namespace tml::cuda
