// linear on the device: outputs in blocks of 64 (times the consumers), tokens in tiles. Its kernels
// are instantiated one to a file in csrc/cuda/gemm.
#pragma once

#include "cuda/gemm.h"
#include "ops/linear.h"

namespace tml::cuda {

template <class Y, int kTokens, int kConsumers>
struct LinearOp {
  struct Params {
    const Bf16* x;
    const Bf16* weight;
    Y* y;
    std::int64_t x_row_stride, y_row_stride;
    std::int64_t num_tokens, in_dim, out_dim;
    bool pairs_are_aligned;
    bool are_static;
  };
  static constexpr bool kPromotes = false;

  static TML_HOST_DEVICE bool weights_are_static(const Params& p) { return p.are_static; }
  static TML_HOST_DEVICE int token_tiles(const Params& p) {
    return static_cast<int>((p.num_tokens + kTokens - 1) / kTokens);
  }
  static TML_HOST_DEVICE int num_tiles(const Params& p) {
    const std::int64_t rows = (blocks_of(p.out_dim) + kConsumers - 1) / kConsumers;
    return static_cast<int>(rows) * token_tiles(p);
  }
  // Token tiles of the same weights are neighbours in time: the second reads them from L2.
  static TML_HOST_DEVICE GemmTile tile(const Params& p, int i) {
    const int columns = token_tiles(p);
    const std::int64_t block = static_cast<std::int64_t>(i / columns) * kConsumers;
    const std::int64_t begin = static_cast<std::int64_t>(i % columns) * kTokens;
    const std::int64_t left = p.num_tokens - begin, blocks = blocks_of(p.out_dim) - block;
    return {p.weight + block * blocks_of(p.in_dim) * kBlockElements,
            block,
            static_cast<std::int32_t>(blocks < kConsumers ? blocks : kConsumers),
            static_cast<std::int32_t>(begin),
            static_cast<std::int32_t>(left < kTokens ? left : kTokens),
            0};
  }
  static TML_HOST_DEVICE std::int64_t depth(const Params& p, const GemmTile&) { return p.in_dim; }
  static TML_DEVICE const Bf16* any_row(const Params& p) { return p.x; }
  static TML_DEVICE const Bf16* token_row(const Params& p, const GemmTile& tile, int row) {
    return p.x + (tile.token_begin + row) * p.x_row_stride;
  }
  static TML_DEVICE void store(const Params& p, const GemmTile& tile, int consumer,
                               const float (&d)[kTokens / 2]) {
    const std::int64_t first = (tile.row_block + consumer) * kBlockRows;
    Y* const y = p.y + tile.token_begin * p.y_row_stride;
    if constexpr (sizeof(Y) == 4) {
      each_value<kTokens>(d, [&](int token, int row, float value) {
        if (token < tile.num_tokens && first + row < p.out_dim)
          y[token * p.y_row_stride + first + row] = value;
      });
    } else {
      const std::int64_t rows = first + threadIdx.x % 128 / 32 * 16;
      const auto put = [&](int token, std::int64_t at, std::uint32_t pair) {
        if (token < tile.num_tokens)
          store_pair(y + token * p.y_row_stride, at, p.out_dim, pair, p.pairs_are_aligned);
      };
#pragma unroll
      for (int i = 0; i < kTokens / 2; i += 4) {
        emit_transposed(pack_bf16(d[i], d[i + 1]), i * 2,
                        [&](int t, int r, std::uint32_t pair) { put(t, rows + r, pair); });
        emit_transposed(pack_bf16(d[i + 2], d[i + 3]), i * 2,
                        [&](int t, int r, std::uint32_t pair) { put(t, rows + 8 + r, pair); });
      }
    }
  }
};

// The operands as the kernel takes them.
template <class Params>
Params linear_operands(const LinearParams& p, bool are_static) {
  Params out{};
  out.x = static_cast<const Bf16*>(p.x);
  out.weight = static_cast<const Bf16*>(p.weight);
  out.y = static_cast<decltype(out.y)>(p.y);
  out.x_row_stride = p.x_row_stride;
  out.y_row_stride = p.y_row_stride;
  out.num_tokens = p.num_tokens;
  out.in_dim = p.in_dim;
  out.out_dim = p.out_dim;
  out.pairs_are_aligned = p.y_row_stride % 2 == 0 && reinterpret_cast<std::uintptr_t>(p.y) % 4 == 0;
  out.are_static = are_static;
  return out;
}

// linear of a weight that a kernel just before may still be writing.
void linear_of_fresh(const LinearParams& p, const Launch& launch);

template <class Y, int kTokens, int kConsumers>
void linear_tiled(const LinearParams& p, bool are_static, const Launch& launch) {
  using Op = LinearOp<Y, kTokens, kConsumers>;
  const auto params = linear_operands<typename Op::Params>(p, are_static);
  launch_gemm<Op, kTokens, kConsumers>("linear", launch, params, Op::num_tiles(params));
}

#define TML_EACH_LINEAR(X, Y) X(Y, 8, 1) X(Y, 16, 1) X(Y, 32, 1) X(Y, 64, 1) X(Y, 256, 2)
#define TML_DECLARE_LINEAR(Y, tokens, consumers) \
  extern template void linear_tiled<Y, tokens, consumers>(const LinearParams&, bool, const Launch&);
TML_EACH_LINEAR(TML_DECLARE_LINEAR, float)
TML_EACH_LINEAR(TML_DECLARE_LINEAR, Bf16)
#undef TML_DECLARE_LINEAR

}  // namespace tml::cuda
