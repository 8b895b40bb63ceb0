// linear_logp: lm_head_logprobs' walk over the vocabulary, keeping what the backward needs. A
// thread owns a range of vocabulary blocks; the folds over the blocks of a row are sequential.
#include "ops/linear_logp.h"

#include "cpu/arena.h"
#include "cpu/cpu.h"
#include "cpu/vocab_blocks.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

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
      const bool is_ignored = p.targets[row] == kIgnoredTarget;
      const float lse = log_sum_exp(blocks, num_blocks);
      p.lse[row] = is_ignored ? 0.0f : lse;
      p.logprobs[row] = is_ignored ? 0.0f : p.logprobs[row] - lse;
      if (has_entropy)
        p.entropy[row] =
            is_ignored ? 0.0f : entropy_of(blocks, moments + row * num_blocks, num_blocks);
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
