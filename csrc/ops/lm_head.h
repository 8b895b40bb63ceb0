// lm_head: log-probabilities and samples over the vocabulary without a [tokens, vocab] tensor.
//   l[n] = sum_k h[k] * w[n, k], n < vocab_size: linear's fp32 chain, not rounded
//   Blocks of 128 entries, absent ones counting zero: m_b = max l, s_b = sum exp(l - m_b) by
//   halving (entry i + entry i + 64, then + 32, ..., + 1). Left fold over ascending blocks from
//   (lowest, 0): m' = max(m, m_b), s = fma(s_b, exp(m_b - m'), s * exp(m - m')); logprob = l - (m +
//   log s).
// lm_head_sample, per row (all draws are functions of seed, position and vocabulary id):
//   temperature 0: the largest allowed l, ties to the lower id
//   else: the largest fma(l, 1 / temperature, g) among the kept ids, ties to the lower id, with
//     g = -log(-log u), u = (bits + 1/2) / 2^32, bits = Philox word id % 4 of block id / 4
//   kept: allowed; with top_k or top_p, ordered by descending l (ties: lower id) with weights
//     exp((l - max l) / temperature), zero weights left out: the first top_k, then the fewest whose
//     summed weight (fp64, in that order) reaches top_p of the total (fp64: in that order after a
//     top_k, else by ascending id)
//   An l that is NaN is never chosen over a number; without a number the first allowed id is taken.
// `weight` is packed by pack_weight; its panels past vocab_size are not read.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tml {

struct LmHeadInput {
  const void* h;  // [num_tokens, in_dim], rows h_row_stride elements apart
  const void* weight;
  std::int64_t h_row_stride;
  std::int64_t num_tokens;
  std::int64_t in_dim;
  std::int64_t vocab_size;
  DType dtype;  // of h and weight: kBf16 or kF32
};

struct LmHeadLogprobsParams {
  LmHeadInput input;
  const std::int64_t* targets;  // [num_tokens], each in [0, vocab_size)
  float* logprobs;              // [num_tokens]
  int num_threads;
};

struct LmHeadSampleParams {
  LmHeadInput input;
  const float* temperature;      // [num_tokens], 0 or >= kMinTemperature
  const std::int32_t* top_k;     // [num_tokens], 0 = off
  const float* top_p;            // [num_tokens], in (0, 1], 1 = off
  const std::int64_t* seed;      // [num_tokens]
  const std::int64_t* position;  // [num_tokens]
  const std::int32_t* allowed;   // [num_tokens, ceil(vocab_size / 32)] bits, or null: all
  std::int64_t* tokens;          // [num_tokens]
  float* logprobs;               // [num_tokens], of the unmasked distribution at temperature 1
  int num_threads;
};

// Below this, 1 / temperature could overflow the scores.
inline constexpr float kMinTemperature = 1e-6f;

}  // namespace tml
