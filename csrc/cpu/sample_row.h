// How one row of lm_head_sample chooses: block by block, or over its stored logits once the whole
// row is known (contract: ops/lm_head.h).
#pragma once

#include "core/memory.h"
#include "cpu/gumbel.h"
#include "cpu/vocab_blocks.h"

namespace tml::cpu::TML_ISA_NS {

struct Best {
  std::int64_t id;  // -1: nothing seen
  float score, logit;
  TML_INLINE void take(std::int64_t new_id, float new_score, float new_logit) {
    id = new_id;
    score = new_score;
    logit = new_logit;
  }
};

// The allowed ids of one row, read 32 at a time.
class Allowed {
 public:
  Allowed(const LmHeadSampleParams& p, std::int64_t row)
      : words_(p.allowed == nullptr
                   ? nullptr
                   : p.allowed + row * ceil_div(p.input.vocab_size, std::int64_t{32})),
        vocab_size_(p.input.vocab_size) {}
  // Bits of ids [32 * word, 32 * word + 32), none past the vocabulary.
  std::uint32_t word(std::int64_t word) const {
    const std::int64_t left = vocab_size_ - word * 32;
    if (left <= 0) return 0;
    const std::uint32_t bits = words_ == nullptr ? ~0u : static_cast<std::uint32_t>(words_[word]);
    return left >= 32 ? bits : bits & ((1u << left) - 1u);
  }

 private:
  const std::int32_t* words_;
  std::int64_t vocab_size_;
};

inline bool is_filtered(const LmHeadSampleParams& p, std::int64_t row) {
  return p.temperature[row] > 0.0f && (p.top_k[row] > 0 || p.top_p[row] < 1.0f);
}

inline void take_best_of_block(const LmHeadSampleParams& p, std::int64_t row, std::int64_t block,
                               const float* logits, Best* best) {
  constexpr int kWords = kVocabBlock / 32;
  alignas(64) float score[kVocabBlock];
  const float temperature = p.temperature[row];
  if (temperature == 0.0f) {
    for (int i = 0; i < kVocabBlock; i += 16) store(score + i, load(logits + i));
  } else {
    gumbel_block(philox_key(p.seed[row]), p.position[row], block, score);
    const Vec scale = set1(1.0f / temperature);
    for (int i = 0; i < kVocabBlock; i += 16)
      store(score + i, fma(load(logits + i), scale, load(score + i)));
  }
  const Allowed allowed(p, row);
  const std::int64_t first_id = block * kVocabBlock;
  for (int w = kWords - 1; w >= 0; --w) {
    const std::uint32_t bits = allowed.word(first_id / 32 + w);
    if (bits == ~0u) continue;
    for (int i = 0; i < 32; ++i)
      if ((bits >> i & 1u) == 0) score[w * 32 + i] = kMinusInf;
  }
  for (int w = 0; w < kWords && best->id < 0; ++w) {
    const std::uint32_t bits = allowed.word(first_id / 32 + w);
    if (bits == 0) continue;
    const int i = w * 32 + __builtin_ctz(bits);
    best->take(first_id + i, kMinusInf, logits[i]);
  }
  Vec top = set1(kMinusInf);
  for (int i = 0; i < kVocabBlock; i += 16) top = max(load(score + i), top);  // skips NaN
  const float highest = hmax(top);
  if (!(highest > best->score)) return;
  int i = 0;
  while (score[i] != highest) ++i;
  best->take(first_id + i, highest, logits[i]);
}

// A logit and its id as one integer: larger is the higher logit, then the lower id.
TML_INLINE std::uint64_t rank_of(float logit, std::int64_t id) {
  const std::uint32_t bits = bits_of(logit + 0.0f);  // -0 is +0
  const std::uint32_t ordered = bits ^ ((bits >> 31) != 0 ? ~0u : 0x80000000u);
  return std::uint64_t{ordered} << 32 | (~static_cast<std::uint32_t>(id));
}
TML_INLINE std::int64_t id_of(std::uint64_t rank) { return ~static_cast<std::uint32_t>(rank); }

inline void sift_down(std::uint64_t* heap, std::int64_t at, std::int64_t count) {
  const std::uint64_t moved = heap[at];
  for (std::int64_t child = 2 * at + 1; child < count; child = 2 * at + 1) {
    if (child + 1 < count && heap[child + 1] > heap[child]) ++child;
    if (heap[child] <= moved) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = moved;
}

// The kept ids of one row, most likely first: a heap whose popped entries gather at its end.
class Ranking {
 public:
  Ranking(std::uint64_t* heap, std::int64_t count) : heap_(heap), count_(count), left_(count) {
    for (std::int64_t at = count / 2; at-- > 0;) sift_down(heap, at, count);
  }
  std::int64_t count() const { return count_; }
  std::int64_t operator[](std::int64_t nth) {
    while (count_ - left_ <= nth) {
      const std::uint64_t top = heap_[0];
      heap_[0] = heap_[--left_];
      sift_down(heap_, 0, left_);
      heap_[left_] = top;
    }
    return id_of(heap_[count_ - 1 - nth]);
  }

 private:
  std::uint64_t* heap_;
  std::int64_t count_, left_;
};

inline Best choose_filtered(const LmHeadSampleParams& p, std::int64_t row, const float* logits) {
  const Allowed allowed(p, row);
  const std::int64_t vocab_size = p.input.vocab_size;
  const std::int64_t num_words = ceil_div(vocab_size, std::int64_t{32});
  Best best{-1, kMinusInf, 0.0f};
  float top = kMinusInf;
  for (std::int64_t w = 0; w < num_words; ++w)
    for (std::uint32_t bits = allowed.word(w); bits != 0; bits &= bits - 1) {
      const std::int64_t id = w * 32 + __builtin_ctz(bits);
      if (best.id < 0) best.take(id, kMinusInf, logits[id]);
      if (logits[id] > top) top = logits[id];
    }
  if (top > -kLowest) top = -kLowest;  // an infinite logit keeps a weight, its own
  const float scale = 1.0f / p.temperature[row];
  auto* heap = static_cast<std::uint64_t*>(
      scratch(Scratch::kThread, static_cast<std::size_t>(vocab_size) * 8));
  std::int64_t num_candidates = 0;
  double total = 0.0;
  for (std::int64_t w = 0; w < num_words; ++w) {
    std::uint32_t bits = allowed.word(w);
    if (bits == 0) continue;
    alignas(64) float weight[32];
    for (int half = 0; half < 32; half += 16) {
      const std::int64_t first = w * 32 + half;
      const auto count = static_cast<int>(std::min<std::int64_t>(16, vocab_size - first));
      if (count <= 0) break;
      const Vec l = count == 16 ? load(logits + first) : load_first(logits + first, count);
      store(weight + half, exp(mul(sub(l, set1(top)), set1(scale))));
    }
    for (; bits != 0; bits &= bits - 1) {
      const int i = __builtin_ctz(bits);
      if (!(weight[i] > 0.0f)) continue;
      heap[num_candidates++] = rank_of(logits[w * 32 + i], w * 32 + i);
      total = total + static_cast<double>(weight[i]);
    }
  }
  const auto weight_of = [&](std::int64_t id) { return exp1((logits[id] - top) * scale); };
  Ranking ranking(heap, num_candidates);
  std::int64_t limit = num_candidates;
  if (p.top_k[row] > 0 && p.top_k[row] < limit) limit = p.top_k[row];
  if (p.top_k[row] > 0) {
    total = 0.0;
    for (std::int64_t nth = 0; nth < limit; ++nth)
      total = total + static_cast<double>(weight_of(ranking[nth]));
  }
  const PhiloxKey key = philox_key(p.seed[row]);
  const double needed = static_cast<double>(p.top_p[row]) * total;
  double reached = 0.0;
  for (std::int64_t nth = 0; nth < limit; ++nth) {
    const std::int64_t id = ranking[nth];
    const float score = __builtin_fmaf(logits[id], scale, gumbel_at(key, p.position[row], id));
    if (score > best.score || (score == best.score && id < best.id))
      best.take(id, score, logits[id]);
    reached = reached + static_cast<double>(weight_of(id));
    if (p.top_p[row] < 1.0f && reached >= needed) break;
  }
  return best;
}

}  // namespace tml::cpu::TML_ISA_NS
