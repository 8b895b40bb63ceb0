// linear_logp: lm_head_logprobs' walk over the vocabulary, with the entropy if asked for. A thread
// owns a range of vocabulary blocks; the folds over the blocks of a row are sequential.
#include "ops/linear_logp.h"

#include "cpu/arena.h"
#include "cpu/cpu.h"
#include "cpu/vocab_blocks.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

template <class T>
void linear_logp_typed(const LinearLogpParams& p) {
  const VocabBlocks<T> vocab(p.input);
  const std::int64_t num_rows = p.input.num_tokens, num_blocks = vocab.num_blocks();
  const bool has_entropy = p.entropy != nullptr;
  KStep* packed;
  BlockSum* sums;
  float* moments;
  Arena(Scratch::kOp)
      .take(&packed, static_cast<std::int64_t>(vocab.packed_bytes() / sizeof(KStep)))
      .take(&sums, num_rows * num_blocks)
      .take(&moments, has_entropy ? num_rows * num_blocks : 0)
      .commit();
  parallel(vocab.is_small() ? 1 : p.num_threads, [&](int thread, int num_threads) {
    vocab.pack(packed, thread, num_threads);
    team_barrier();
    vocab.for_each(packed, split(num_blocks, thread, num_threads),
                   [&](std::int64_t row, std::int64_t block, const float* logits) {
                     const BlockSum sum = block_sum(logits);
                     sums[row * num_blocks + block] = sum;
                     if (has_entropy)
                       moments[row * num_blocks + block] = block_moment(logits, sum.max);
                     const std::int64_t at = p.targets[row] - block * kVocabBlock;
                     if (at >= 0 && at < kVocabBlock) p.logprobs[row] = logits[at];
                   });
    team_barrier();
    const Range rows = split(num_rows, thread, num_threads);
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      const BlockSum* blocks = sums + row * num_blocks;
      p.logprobs[row] -= log_sum_exp(blocks, num_blocks);
      if (has_entropy) p.entropy[row] = entropy_of(blocks, moments + row * num_blocks, num_blocks);
    }
  });
}

}  // namespace

void linear_logp(const LinearLogpParams& p) {
  if (p.input.num_tokens == 0) return;
  if (p.input.dtype == DType::kF32) return TML_F32(linear_logp, linear_logp_typed<float>)(p);
  linear_logp_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
