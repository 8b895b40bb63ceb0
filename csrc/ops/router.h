// router: which experts a token visits, and with what weight.
//   l[n] = sum_h x[h] * w[n, h]: one fp32 chain in ascending h (x upcast exactly), n < experts +
//   shared chosen = the top_k experts by 1 / (1 + exp(-l)) + bias, ties to the lower id, ascending
//   by id;
//            a NaN score loses to every number, and among NaN the lower id wins
//   ls = min(l, 0) - log(1 + exp(-|l|)) of the chosen, then of the shared
//   weight = exp(ls - max ls) / (sum of the exps in that order) * scale, rounded to the type of x
// `weight` is packed by pack_weight from fp32: [panels][in_dim][32].
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tml {

inline constexpr int kRouterMaxOutputs = 512;
inline constexpr int kRouterMaxTopK = 32;

struct RouterParams {
  const void* x;  // [num_tokens, in_dim], rows x_row_stride elements apart
  const void* weight;
  const float* bias;         // [num_experts], added for the choice only
  std::int32_t* expert_ids;  // [num_tokens, top_k]
  float* weights;            // [num_tokens, top_k]
  float* gammas;             // [num_tokens, num_shared]
  float* logits;             // [num_tokens, num_experts + num_shared], or null
  std::int64_t x_row_stride;
  std::int64_t num_tokens;
  std::int64_t in_dim;
  std::int32_t num_experts;
  std::int32_t num_shared;
  std::int32_t top_k;
  float scale;
  DType dtype;  // of x: kBf16 or kF32
  int num_threads;
};

}  // namespace tml
