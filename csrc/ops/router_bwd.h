// router_bwd: gradients of the router's weights and gammas (and logits) in x, the gate weight and
// the scale.
// The choice of experts is not differentiated. For a token with shares p_i over its chosen experts,
// then the shared ones, and gradients d_i of weights and gammas:
//   d ls_i = scale p_i (d_i - sum_j p_j d_j)       the sum is one fma chain in that order
//   d l_i  = d ls_i / (1 + exp(l_i)), plus the gradient of the logit where there is one
//   dx     = sum_n d l_n w[n]                      fma from 0 in ascending n, one rounding
//   dw[n]  = sum_t d l_n[t] x[t]                   fma from 0 in ascending t inside a block of
//            contract::kGradBlock tokens; blocks added in ascending order; fp32
//   dscale = sum_t sum_j p_j d_j                   added in the same blocks and order
// Outputs a token did not choose are left out of its sums, unless logits have gradients.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tml {

struct RouterBwdParams {
  const void* x;                   // [num_tokens, in_dim], rows x_row_stride elements apart
  const float* weight;             // [num_experts + num_shared, in_dim], as it is trained
  const std::int32_t* expert_ids;  // [num_tokens, top_k]
  const float* logits;             // [num_tokens, num_experts + num_shared]
  const float* dweights;           // [num_tokens, top_k]
  const float* dgammas;            // [num_tokens, num_shared]
  const float* dlogits;            // [num_tokens, num_experts + num_shared], or null
  void* dx;                        // [num_tokens, in_dim]
  float* dw;                       // like weight
  float* dscale;                   // [1]
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
