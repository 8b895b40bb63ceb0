// linear_logp: log-probabilities (and entropy) of a vocabulary head for training, with gradients.
// Nothing of size [tokens, vocab] is stored: the backward recomputes the logits block by block.
//   logprob, lse: lm_head_logprobs' own chains, blocks and folds (ops/lm_head.h), bit for bit
//   entropy = ln S - U / S with S = sum exp(l - m), U = sum exp(l - m) (l - m): per block of 128 by
//   the same halving, blocks left-folded:
//     m' = max(m, m_b), a = exp(m - m'), b = exp(m_b - m'),
//     U = fma(fma(s_b, m_b - m', U_b), b, fma(S, m - m', U) * a), S = fma(s_b, b, S * a)
//   A target of -100 is ignored: logprob 0, entropy 0, no gradient, its row of h is never summed.
// linear_logp_bwd, with p = exp(l - lse):
//   dl[t, n] = round(g * (onehot - p) - g_entropy * p * ((l - lse) + entropy))
//   dh[t, :] = round(chain over n ascending of dl[t, n] * w[n, :])
//   dw[n, :] = sum over blocks of 512 tokens, ascending, of (chain over t ascending of dl[t, n] *
//   h[t, :]), one rounding to the type of dw; rows past vocab_size are 0
#pragma once

#include "ops/lm_head.h"

namespace tml {

inline constexpr std::int64_t kIgnoredTarget = -100;

struct LinearLogpParams {
  LmHeadInput input;            // weight packed by pack_weight
  const std::int64_t* targets;  // [num_tokens], each in [0, vocab_size) or kIgnoredTarget
  float* logprobs;              // [num_tokens]
  float* lse;                   // [num_tokens]
  float* entropy;               // [num_tokens], or null
  int num_threads;
};

struct LinearLogpBwdParams {
  const void* h;       // [num_tokens, in_dim], rows h_row_stride elements apart
  const void* weight;  // [num_rows, in_dim], plain
  std::int64_t h_row_stride;
  std::int64_t weight_row_stride;
  std::int64_t num_tokens;
  std::int64_t in_dim;
  std::int64_t num_rows;
  std::int64_t vocab_size;      // <= num_rows
  const std::int64_t* targets;  // [num_tokens]
  const float* lse;             // [num_tokens]
  const float* entropy;         // [num_tokens], or null
  const float* d_logprobs;      // [num_tokens]
  const float* d_entropy;       // [num_tokens], or null; needs entropy
  void* dh;                     // [num_tokens, in_dim]
  void* dw;                     // [num_rows, in_dim]
  DType dtype;                  // of h, weight, dh and dw: kBf16 or kF32
  int num_threads;
};

}  // namespace tml
