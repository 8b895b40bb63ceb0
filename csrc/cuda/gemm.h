// The contract product of every matrix op: D[64 weight rows, tokens] = W X^T by wgmma m64nNk16, one
// accumulator per output, ascending k16 groups, no split along k. Weights are the M operand at any
// number of tokens, so one and sixty-four tokens cost the same stream of weights, and a result does
// not depend on how many tokens or which others share a tile.
//
// A block is one producer warpgroup and kConsumers warpgroups of 64 weight rows each, persistent
// over tiles, with a ring of 64-deep stages: weights by the copy engine (contiguous blocks, see
// cuda/layout.h), token rows by cp.async (gathered, swizzled, absent ones zero). full[s] counts the
// copy engine's bytes and one arrival of each producer thread; empty[s] one of each consumer warp.
// cp.async writes through the generic proxy and wgmma reads through the asynchronous one: each
// consumer thread fences between waiting for full[s] and reading.
//
// Op: Params; weights_are_static(p) (weights of a block's first tile may be fetched before the
// kernels before this one end); num_tiles(p), tile(p, i) -> Tile {weight, token_begin, num_tokens,
// row,
// ...}, depth(p, tile): its k; token_row(p, tile, i) -> first element of a token's row; store(p,
// tile, group, d). An Op
// that kPromotes also has chain_blocks(p), the k blocks of one accumulator: their results are added
// up in fp32, in ascending order, to what start(p, tile, group, total) puts there.
#pragma once

#include "cuda/launch.h"
#include "cuda/math.h"
#include "cuda/wgmma.h"

namespace tml::cuda {

using Bf16 = std::uint16_t;

struct GemmTile {
  const Bf16* weight;       // block row of the first consumer
  std::int64_t row_block;   // which 64 rows of the matrix that is
  std::int32_t num_blocks;  // block rows that exist, up to kConsumers
  std::int32_t token_begin;
  std::int32_t num_tokens;  // of this tile, at most kTokens
  std::int32_t group;       // expert, if the op has experts
};

template <int kTokens, int kConsumers>
struct GemmShape {
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kWeightBytes = kConsumers * kBlockBytes;
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  // Two blocks share an SM where accumulators are small; one takes it all where they are large.
  static constexpr int kBlocksPerSm = kConsumers == 1 ? 2 : 1;
  static constexpr int kStages = (kBlocksPerSm == 2 ? 104 : 208) * 1024 / kStageBytes;
  static constexpr int kSharedBytes = kStages * (kStageBytes + 16);
};

template <class Op, int kTokens, int kConsumers>
TML_KERNEL((GemmShape<kTokens, kConsumers>::kThreads),
           (GemmShape<kTokens, kConsumers>::kBlocksPerSm))
gemm_kernel(const TML_GRID_CONSTANT typename Op::Params p) {
  using Shape = GemmShape<kTokens, kConsumers>;
  unsigned char* const stages = shared_memory();
  auto* const full = reinterpret_cast<std::uint64_t*>(stages + Shape::kStages * Shape::kStageBytes);
  std::uint64_t* const empty = full + Shape::kStages;
  const int thread = static_cast<int>(threadIdx.x % 128);
  const int warpgroup = static_cast<int>(threadIdx.x / 128);
  const auto k_blocks_of = [&](const GemmTile& tile) {
    return static_cast<int>(blocks_of(Op::depth(p, tile)));
  };
  if (threadIdx.x == 0) {
    for (int s = 0; s < Shape::kStages; ++s) {
      mbarrier_init(full + s, 128 + 1);
      mbarrier_init(empty + s, 4 * kConsumers);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  grid_launch_dependents();

  int stage = 0;
  std::uint32_t phase = 0;
  const auto next_stage = [&] {
    if (++stage == Shape::kStages) {
      stage = 0;
      phase ^= 1;
    }
  };
  if (warpgroup == 0) {
    if constexpr (kConsumers > 1) lower_registers<56>();
    const std::uint64_t once = evict_first();
    const auto load_weights = [&](const GemmTile& tile, int k, int s) {
      if (thread != 0) return;
      const int k_blocks = k_blocks_of(tile);
      const auto bytes = static_cast<std::uint32_t>(tile.num_blocks) * kBlockBytes;
      mbarrier_arrive_expect(full + s, bytes);
      for (int b = 0; b < tile.num_blocks; ++b)
        bulk_load(stages + s * Shape::kStageBytes + b * kBlockBytes,
                  tile.weight + (static_cast<std::int64_t>(b) * k_blocks + k) * kBlockElements,
                  kBlockBytes, full + s, once);
    };
    int ahead = 0;  // stages of the first tile whose weights are under way
    if (Op::weights_are_static(p)) {
      if (static_cast<int>(blockIdx.x) < Op::num_tiles(p)) {
        const GemmTile first = Op::tile(p, static_cast<int>(blockIdx.x));
        const int k_blocks = k_blocks_of(first);
        ahead = k_blocks < Shape::kStages ? k_blocks : Shape::kStages;
        for (int k = 0; k < ahead; ++k) load_weights(first, k, k);
      }
    }
    grid_wait();
    const int num_tiles = Op::num_tiles(p);
    // Chunk of sixteen bytes: eight of them are one row's 64 k.
    constexpr int kCopies = (kTokens * 8 + 127) / 128;
    for (int i = static_cast<int>(blockIdx.x); i < num_tiles; i += static_cast<int>(gridDim.x)) {
      const GemmTile tile = Op::tile(p, i);
      const std::int64_t depth = Op::depth(p, tile);
      const int k_blocks = k_blocks_of(tile), chunk = thread % 8;
      const Bf16* rows[kCopies];
#pragma unroll
      for (int c = 0; c < kCopies; ++c) {
        const int row = c * 16 + thread / 8;
        rows[c] = row < tile.num_tokens ? Op::token_row(p, tile, row) + chunk * 8 : nullptr;
      }
      for (int k = 0; k < k_blocks; ++k) {
        mbarrier_wait(empty + stage, phase ^ 1);
        if (ahead > 0)
          --ahead;
        else
          load_weights(tile, k, stage);
        unsigned char* const tokens = stages + stage * Shape::kStageBytes + Shape::kWeightBytes;
        const std::int64_t left = (depth - k * kBlockDepth - chunk * 8) * 2;
        const int bytes = left >= 16 ? 16 : left > 0 ? static_cast<int>(left) : 0;
#pragma unroll
        for (int c = 0; c < kCopies; ++c) {
          const int row = c * 16 + thread / 8;
          if (row >= kTokens) break;
          const bool is_present = rows[c] != nullptr && bytes > 0;
          copy16(tokens + swizzled_bytes(row, chunk),
                 is_present ? rows[c] + k * kBlockDepth : Op::any_row(p), is_present ? bytes : 0);
        }
        copy_arrive(full + stage);
        next_stage();
      }
    }
    copy_commit();
    copy_wait<0>();
    return;
  }
  if constexpr (kConsumers > 1) raise_registers<224>();
  grid_wait();
  const int num_tiles = Op::num_tiles(p);
  const int consumer = warpgroup - 1;
  for (int i = static_cast<int>(blockIdx.x); i < num_tiles; i += static_cast<int>(gridDim.x)) {
    const GemmTile tile = Op::tile(p, i);
    const int k_blocks = k_blocks_of(tile);
    float d[kTokens / 2];
    float total[Op::kPromotes ? kTokens / 2 : 1];
    if constexpr (Op::kPromotes) Op::start(p, tile, consumer, total);
    int previous = -1, chain = 0;  // k blocks in the accumulator
    for (int k = 0; k < k_blocks; ++k) {
      mbarrier_wait(full + stage, phase);
      proxy_fence();
      const std::uint32_t base = shared_address(stages + stage * Shape::kStageBytes);
      wgmma_hold(d);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step)
        Wgmma<kTokens>::mma(
            d, weight_descriptor(base + static_cast<std::uint32_t>(consumer * kBlockBytes), step),
            token_descriptor(base + static_cast<std::uint32_t>(Shape::kWeightBytes), step),
            (chain | step) != 0);
      wgmma_commit();
      ++chain;
      wgmma_hold(d);
      // The group before this one is done: its stage may be filled again.
      wgmma_wait<1>();
      if (previous >= 0 && thread % 32 == 0) mbarrier_arrive(empty + previous);
      previous = stage;
      next_stage();
      if constexpr (Op::kPromotes) {
        if (chain < Op::chain_blocks(p) && k + 1 < k_blocks) continue;
        wgmma_wait<0>();
        wgmma_hold(d);
#pragma unroll
        for (int j = 0; j < kTokens / 2; ++j) total[j] = __fadd_rn(total[j], d[j]);
        chain = 0;
      }
    }
    wgmma_wait<0>();
    wgmma_hold(d);
    if (previous >= 0 && thread % 32 == 0) mbarrier_arrive(empty + previous);
    if (consumer >= tile.num_blocks) continue;
    if constexpr (Op::kPromotes)
      Op::store(p, tile, consumer, total);
    else
      Op::store(p, tile, consumer, d);
  }
}

// emit(token of the tile, weight row of the 64, value): fp32 results as the thread holds them.
template <int kTokens, class Emit>
TML_DEVICE void each_value(const float (&d)[kTokens / 2], const Emit& emit) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x % 128 / 32);
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i)
    emit(fragment_column(lane, i), warp * 16 + fragment_row(lane, i), d[i]);
}

// value(i) -> the pair of register i and i + 1 (two tokens of one row) as bf16; emit(token, pair of
// rows 2j, 2j + 1 of eight, packed): transposed, so that a lane stores neighbouring outputs.
template <class Emit>
TML_DEVICE void emit_transposed(std::uint32_t two_tokens, int column, const Emit& emit) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  emit(column + lane / 4, lane % 4 * 2, transpose_tile(two_tokens));
}

// Two neighbouring bf16 of a row of `width`; pairs are stored as one word where that is aligned.
TML_DEVICE void store_pair(Bf16* row, std::int64_t at, std::int64_t width, std::uint32_t pair,
                           bool is_aligned) {
  if (is_aligned && at + 1 < width) {
    *reinterpret_cast<std::uint32_t*>(row + at) = pair;
    return;
  }
  if (at < width) row[at] = static_cast<Bf16>(pair);
  if (at + 1 < width) row[at + 1] = static_cast<Bf16>(pair >> 16);
}

template <class Op, int kTokens, int kConsumers>
void launch_gemm(const char* op, const Launch& launch, const typename Op::Params& params,
                 std::int64_t max_tiles) {
  using Shape = GemmShape<kTokens, kConsumers>;
  const std::int64_t slots = static_cast<std::int64_t>(launch.num_sms) * Shape::kBlocksPerSm;
  launch_kernel(op, launch, gemm_kernel<Op, kTokens, kConsumers>,
                static_cast<unsigned>(max_tiles < slots ? max_tiles : slots), Shape::kThreads,
                Shape::kSharedBytes, params);
}

}  // namespace tml::cuda
