// lm_head_sample: one pass over the weights serves every row. Rows without top_k and top_p keep the
// best id of each thread's blocks; the others keep their logits and are decided after the pass.
#include "cpu/cpu.h"
#include "cpu/gumbel.h"
#include "cpu/vocab_blocks.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

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

bool is_filtered(const LmHeadSampleParams& p, std::int64_t row) {
  return p.temperature[row] > 0.0f && (p.top_k[row] > 0 || p.top_p[row] < 1.0f);
}

void take_best_of_block(const LmHeadSampleParams& p, std::int64_t row, std::int64_t block,
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

void sift_down(std::uint64_t* heap, std::int64_t at, std::int64_t count) {
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

Best choose_filtered(const LmHeadSampleParams& p, std::int64_t row, const float* logits) {
  const Allowed allowed(p, row);
  const std::int64_t vocab_size = p.input.vocab_size;
  const auto for_each_allowed = [&](const auto& body) {
    for (std::int64_t w = 0; w * 32 < vocab_size; ++w)
      for (std::uint32_t bits = allowed.word(w); bits != 0; bits &= bits - 1)
        body(w * 32 + __builtin_ctz(bits));
  };
  Best best{-1, kMinusInf, 0.0f};
  float top = kMinusInf;
  for_each_allowed([&](std::int64_t id) {
    if (best.id < 0) best.take(id, kMinusInf, logits[id]);
    if (logits[id] > top) top = logits[id];
  });
  const float scale = 1.0f / p.temperature[row];
  const auto weight_of = [&](std::int64_t id) { return exp1((logits[id] - top) * scale); };
  auto* heap = static_cast<std::uint64_t*>(
      scratch(Scratch::kThread, static_cast<std::size_t>(vocab_size) * 8));
  std::int64_t num_candidates = 0;
  double total = 0.0;
  for_each_allowed([&](std::int64_t id) {
    const float weight = weight_of(id);
    if (!(weight > 0.0f)) return;
    heap[num_candidates++] = rank_of(logits[id], id);
    total = total + static_cast<double>(weight);
  });
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
    if (num_threads > 1) {
#pragma omp barrier
    }
    vocab.for_each(packed, split(num_blocks, thread, num_threads),
                   [&](std::int64_t row, std::int64_t block, const float* logits) {
                     sums[row * num_blocks + block] = block_sum(logits);
                     if (kept[row] == nullptr)
                       return take_best_of_block(p, row, block, logits, own + row);
                     const std::int64_t first = block * kVocabBlock;
                     for (std::int64_t i = 0; i < kVocabBlock && first + i < vocab_size; ++i)
                       kept[row][first + i] = logits[i];
                   });
    if (num_threads > 1) {
#pragma omp barrier
    }
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
  if (p.input.dtype == DType::kF32) return lm_head_sample_typed<float>(p);
  lm_head_sample_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
