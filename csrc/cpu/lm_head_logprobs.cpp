// lm_head_logprobs: a thread owns a range of vocabulary blocks and keeps one (max, sum) a block and
// row; the fold over the blocks of a row is sequential, whoever computed them.
#include "cpu/cpu.h"
#include "cpu/vocab_blocks.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

template <class T>
void lm_head_logprobs_typed(const LmHeadLogprobsParams& p) {
  const VocabBlocks<T> vocab(p.input);
  const std::int64_t num_rows = p.input.num_tokens, num_blocks = vocab.num_blocks();
  const std::size_t packed_bytes = vocab.packed_bytes();
  auto* base = static_cast<char*>(
      scratch(Scratch::kOp, packed_bytes + static_cast<std::size_t>(num_rows * num_blocks) * 8));
  auto* packed = reinterpret_cast<KStep*>(base);
  auto* sums = reinterpret_cast<BlockSum*>(base + packed_bytes);
  parallel(vocab.is_small() ? 1 : p.num_threads, [&](int thread, int num_threads) {
    vocab.pack(packed, thread, num_threads);
    team_barrier();
    vocab.for_each(packed, split(num_blocks, thread, num_threads),
                   [&](std::int64_t row, std::int64_t block, const float* logits) {
                     sums[row * num_blocks + block] = block_sum(logits);
                     const std::int64_t at = p.targets[row] - block * kVocabBlock;
                     if (at >= 0 && at < kVocabBlock) p.logprobs[row] = logits[at];
                   });
    team_barrier();
    const Range rows = split(num_rows, thread, num_threads);
    for (std::int64_t row = rows.begin; row < rows.end; ++row)
      p.logprobs[row] = p.logprobs[row] - log_sum_exp(sums + row * num_blocks, num_blocks);
  });
}

}  // namespace

void lm_head_logprobs(const LmHeadLogprobsParams& p) {
  if (p.input.num_tokens == 0) return;
  if (p.input.dtype == DType::kF32)
    return TML_F32(lm_head_logprobs, lm_head_logprobs_typed<float>)(p);
  lm_head_logprobs_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
