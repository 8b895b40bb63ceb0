// The logits of token rows, one vocabulary block at a time, and the log-sum-exp over the blocks
// (contract: ops/lm_head.h). Shared by log-probabilities, their gradients and sampling, so that all
// have one bit.
#pragma once

#include "core/memory.h"
#include "cpu/panel_rows.h"
#include "cpu/parallel.h"
#include "ops/lm_head.h"

namespace tml::cpu::TML_ISA_NS {

inline constexpr int kVocabBlock = contract::kVocabBlock;
inline constexpr float kLowest = -3.40282347e+38f;
inline constexpr float kMinusInf = -__builtin_inff();
// Rows whose block logits sit in L2 beside the weights of the block.
inline constexpr std::int64_t kGroupRows = 96;
// Below this many bytes of weights a second thread costs more than it saves.
inline constexpr std::int64_t kMinVocabBytes = 96 << 10;

struct BlockSum {
  float max, sum;
};

// logits[128], absent entries -inf. A NaN leaves the maximum to the numbers and the sum NaN.
TML_INLINE BlockSum block_sum(const float* logits) {
  constexpr int kVecs = kVocabBlock / 16;
  Vec top = set1(kLowest);
  for (int v = 0; v < kVecs; ++v) top = max(load(logits + v * 16), top);
  const float m = hmax(top);
  Vec e[kVecs];
  for (int v = 0; v < kVecs; ++v) e[v] = exp(sub(load(logits + v * 16), set1(m)));
  for (int half = kVecs / 2; half > 0; half /= 2)
    for (int v = 0; v < half; ++v) e[v] = add(e[v], e[v + half]);
  return {m, hsum(e[0])};
}

TML_INLINE float log_sum_exp(const BlockSum* blocks, std::int64_t num_blocks) {
  float m = kLowest, s = 0.0f;
  for (std::int64_t b = 0; b < num_blocks; ++b) {
    const float next = blocks[b].max > m ? blocks[b].max : m;
    s = __builtin_fmaf(blocks[b].sum, exp1(blocks[b].max - next), s * exp1(m - next));
    m = next;
  }
  return s == s ? m + log1(s) : s;  // log1 is defined for numbers only
}

// sum of exp(l - m) (l - m) over one block, by block_sum's tree.
TML_INLINE float block_moment(const float* logits, float m) {
  constexpr int kVecs = kVocabBlock / 16;
  Vec e[kVecs];
  for (int v = 0; v < kVecs; ++v) {
    const Vec x = sub(load(logits + v * 16), set1(m));
    e[v] = mul(exp(x), max(x, set1(-100.0f)));  // absent: 0 * -100, not 0 * -inf
  }
  for (int half = kVecs / 2; half > 0; half /= 2)
    for (int v = 0; v < half; ++v) e[v] = add(e[v], e[v + half]);
  return hsum(e[0]);
}

// In nats, of a whole row.
TML_INLINE float entropy_of(const BlockSum* blocks, const float* moments, std::int64_t num_blocks) {
  float m = blocks[0].max, s = blocks[0].sum, u = moments[0];
  for (std::int64_t b = 1; b < num_blocks; ++b) {
    const float next = blocks[b].max > m ? blocks[b].max : m;
    const float from = m - next, to = blocks[b].max - next;
    const float weight_m = exp1(from), weight_b = exp1(to);
    u = __builtin_fmaf(__builtin_fmaf(blocks[b].sum, to, moments[b]), weight_b,
                       __builtin_fmaf(s, from, u) * weight_m);
    s = __builtin_fmaf(blocks[b].sum, weight_b, s * weight_m);
    m = next;
  }
  return s == s ? log1(s) - u / s : s;
}

// The packed rows of one call and where its blocks lie.
template <class T>
class VocabBlocks {
 public:
  explicit VocabBlocks(const LmHeadInput& in)
      : in_(in),
        num_steps_(num_k_steps(in.dtype, in.in_dim)),
        num_panels_(ceil_div(in.vocab_size, contract::kPanel)) {}

  std::int64_t num_blocks() const { return ceil_div(in_.vocab_size, kVocabBlock); }
  std::size_t packed_bytes() const {
    return static_cast<std::size_t>(ceil_div(in_.num_tokens * num_steps_, 16) * 64);
  }
  bool is_small() const {
    return num_panels_ * num_steps_ * contract::kPanel * 4 * ceil_div(in_.num_tokens, kTileRows) <
           kMinVocabBytes;
  }

  // Packs this thread's groups of rows; a barrier must follow.
  void pack(KStep* packed, int thread, int num_threads) const {
    const Range groups = split(ceil_div(in_.num_tokens, kGroupRows), thread, num_threads);
    for (std::int64_t group = groups.begin; group < groups.end; ++group) {
      const std::int64_t first = group * kGroupRows;
      const TileSplit tiles(std::min(kGroupRows, in_.num_tokens - first));
      const T* h = static_cast<const T*>(in_.h) + first * in_.h_row_stride;
      for (std::int64_t tile = 0; tile < tiles.count; ++tile)
        pack_rows<T>(packed + (first + tiles.begin(tile)) * num_steps_, tiles.rows(tile),
                     in_.in_dim,
                     [&](int m) { return h + (tiles.begin(tile) + m) * in_.h_row_stride; });
    }
  }

  // visit(row, block, logits[128]) for every row of each block of the range, blocks ascending.
  template <class Visit>
  void for_each(const KStep* packed, Range blocks, const Visit& visit) const {
    constexpr std::int64_t kBlockPanels = kVocabBlock / contract::kPanel;
    const std::int64_t buffer_rows = std::min(kGroupRows, in_.num_tokens);
    auto* logits = static_cast<float*>(
        scratch(Scratch::kThread, static_cast<std::size_t>(buffer_rows * kVocabBlock) * 4));
    for (std::int64_t block = blocks.begin; block < blocks.end; ++block) {
      const std::int64_t panel = block * kBlockPanels;
      const std::int64_t panel_end = std::min(panel + kBlockPanels, num_panels_);
      const std::int64_t present =
          std::min<std::int64_t>(kVocabBlock, in_.vocab_size - block * kVocabBlock);
      for (std::int64_t first = 0; first < in_.num_tokens; first += kGroupRows) {
        const std::int64_t rows = std::min(kGroupRows, in_.num_tokens - first);
        multiply_tiles<sizeof(T) == 2>(
            static_cast<const KStep*>(in_.weight), num_steps_, panel, panel_end,
            packed + first * num_steps_, rows,
            [&](std::int64_t m, std::int64_t at, int vec, Vec acc) {
              store(logits + m * kVocabBlock + (at - panel) * contract::kPanel + vec * 16, acc);
            });
        for (std::int64_t m = 0; m < rows; ++m) {
          float* row = logits + m * kVocabBlock;
          for (std::int64_t i = present; i < kVocabBlock; ++i) row[i] = kMinusInf;
          visit(first + m, block, row);
        }
      }
    }
  }

 private:
  LmHeadInput in_;
  std::int64_t num_steps_, num_panels_;
};

}  // namespace tml::cpu::TML_ISA_NS
