// lm_head_sample: one pass over the weights serves every row. Rows without top_k and top_p keep the
// best id of each thread's blocks; the others keep their logits and are decided after the pass.
#include "cpu/cpu.h"
#include "cpu/sample_row.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

template <class T>
void lm_head_sample_typed(const LmHeadSampleParams& p) {
  const VocabBlocks<T> vocab(p.input);
  const std::int64_t num_rows = p.input.num_tokens, num_blocks = vocab.num_blocks();
  const std::int64_t vocab_size = p.input.vocab_size;
  std::int64_t num_filtered = 0;
  for (std::int64_t row = 0; row < num_rows; ++row) num_filtered += is_filtered(p, row);
  const int max_threads = vocab.is_small() ? 1 : p.num_threads;
  const std::size_t packed_bytes = vocab.packed_bytes();
  const auto sums_bytes = static_cast<std::size_t>(num_rows * num_blocks) * sizeof(BlockSum);
  const auto best_bytes = static_cast<std::size_t>(num_rows * max_threads) * sizeof(Best);
  const auto kept_bytes = static_cast<std::size_t>(num_rows) * sizeof(float*);
  const auto logits_bytes = static_cast<std::size_t>(num_filtered * vocab_size) * sizeof(float);
  auto* base = static_cast<char*>(
      scratch(Scratch::kOp, packed_bytes + sums_bytes + best_bytes + kept_bytes + logits_bytes));
  auto* packed = reinterpret_cast<KStep*>(base);
  auto* sums = reinterpret_cast<BlockSum*>(base + packed_bytes);
  auto* bests = reinterpret_cast<Best*>(base + packed_bytes + sums_bytes);
  // The logits of a filtered row; null for the others.
  auto* kept = reinterpret_cast<float**>(base + packed_bytes + sums_bytes + best_bytes);
  auto* next = reinterpret_cast<float*>(base + packed_bytes + sums_bytes + best_bytes + kept_bytes);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    kept[row] = is_filtered(p, row) ? next : nullptr;
    if (kept[row] != nullptr) next += vocab_size;
  }
  parallel(max_threads, [&](int thread, int num_threads) {
    Best* own = bests + thread * num_rows;
    for (std::int64_t row = 0; row < num_rows; ++row) own[row] = {-1, kMinusInf, 0.0f};
    vocab.pack(packed, thread, num_threads);
    team_barrier();
    vocab.for_each(packed, split(num_blocks, thread, num_threads),
                   [&](std::int64_t row, std::int64_t block, const float* logits) {
                     sums[row * num_blocks + block] = block_sum(logits);
                     if (kept[row] == nullptr)
                       return take_best_of_block(p, row, block, logits, own + row);
                     const std::int64_t first = block * kVocabBlock;
                     for (std::int64_t i = 0; i < kVocabBlock && first + i < vocab_size; ++i)
                       kept[row][first + i] = logits[i];
                   });
    team_barrier();
    const Range rows = split(num_rows, thread, num_threads);
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      Best best = bests[row];
      if (kept[row] != nullptr) {
        best = choose_filtered(p, row, kept[row]);
      } else {
        for (int other = 1; other < num_threads; ++other) {  // their blocks ascend
          const Best& b = bests[other * num_rows + row];
          if (b.id >= 0 && (best.id < 0 || b.score > best.score)) best = b;
        }
      }
      p.tokens[row] = best.id;
      p.logprobs[row] = best.logit - log_sum_exp(sums + row * num_blocks, num_blocks);
    }
  });
}

}  // namespace

void lm_head_sample(const LmHeadSampleParams& p) {
  if (p.input.num_tokens == 0) return;
  if (p.input.dtype == DType::kF32) return TML_F32(lm_head_sample, lm_head_sample_typed<float>)(p);
  lm_head_sample_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
