// linear_logp: log-probabilities (and entropy) of a vocabulary head for training, with gradients.
// Logits are never stored but for as many tokens as kLogitRoom has room for.
//   logprob: lm_head_logprobs' own chains, blocks and folds (ops/lm_head.h), bit for bit
//   entropy = ln S - U / S with S = sum exp(l - m), U = sum exp(l - m) (l - m): per block of 128 by
//   the same halving, blocks left-folded:
//     m' = max(m, m_b), a = exp(m - m'), b = exp(m_b - m'),
//     U = fma(fma(s_b, m_b - m', U_b), b, fma(S, m - m', U) * a), S = fma(s_b, b, S * a)
// linear_logp_bwd, with lse = m + log s and p = exp(l - lse):
//   dl[t, n] = round(g * (onehot - p) - g_entropy * p * ((l - lse) + entropy))
//   dh[t, :] = round(chain over n ascending of dl[t, n] * w[n, :])
//   dw[n, :] = sum over blocks of logp_block(vocab_size) tokens, ascending, of (chain over t
//   ascending of dl[t, n] * h[t, :]), one rounding to the type of dw; rows past vocab_size are 0
#pragma once

#include <algorithm>

#include "core/contract.h"
#include "ops/lm_head.h"

namespace tml {

// Logits that are kept at a time, in all rows together.
inline constexpr std::int64_t kLogitRoom = 16 << 20;

// Tokens that a chain of dw goes over: 512, or where the vocabulary is large what there is room
// for.
constexpr std::int64_t logp_block(std::int64_t vocab_size) {
  return std::clamp<std::int64_t>(kLogitRoom / vocab_size / 16 * 16, 16, contract::kGradBlock);
}

struct LinearLogpParams {
  LmHeadInput input;            // weight packed by pack_weight
  const std::int64_t* targets;  // [num_tokens], each in [0, vocab_size)
  float* logprobs;              // [num_tokens]
  float* entropy;               // [num_tokens], or null
  int num_threads;
};

struct LinearLogpBwdParams {
  LmHeadInput input;   // weight packed by pack_weight
  const void* weight;  // the same, plain: [num_rows, in_dim]
  std::int64_t weight_row_stride;
  std::int64_t num_rows;        // >= input.vocab_size
  const std::int64_t* targets;  // [num_tokens], each in [0, vocab_size)
  const float* d_logprobs;      // [num_tokens]
  const float* d_entropy;       // [num_tokens], or null
  float* logprobs;              // [num_tokens], as linear_logp has them
  void* dh;                     // [num_tokens, in_dim], of the input's type
  void* dw;                     // [num_rows, in_dim], of the input's type
  int num_threads;
};

}  // namespace tml
