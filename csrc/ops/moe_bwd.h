// moe_bwd: gradients of moe from dy and the gate | up it saved. For token t at expert e, with
// s = its weight or gamma and matrices W13_e, W2_e:
//   u = W2_e^T dy[t]                          one fp32 chain in ascending h
//   act = gate / (1 + exp(-gate)), a = act * up
//   d weights[t, j] = u . round(a), d gammas[t, s] = u . a     sixteen lanes, then hsum's tree
//   d gate = s u up (sig + act (1 - sig)), d up = s u act      each rounded
//   dx[t] = sum_e W13_e^T [d gate | d up]     one fp32 chain a term, in ascending row of W13; terms
//           added in ascending expert id, shared experts last; one rounding
//   d W2_e  = sum_t dy[t] round(s a)^T, d W13_e = sum_t [d gate | d up] x[t]^T
// The sums over an expert's tokens (ascending) are cut into blocks of contract::kGradBlock of them:
// one fp32 chain a block, the blocks added in ascending order, one rounding to the weights' type.
// No sum depends on tokens that did not choose the expert, and no [pairs, hidden] array exists.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tml {

struct MoeBwdParams {
  const void* dy;                  // [num_tokens, hidden], rows dy_row_stride elements apart
  const void* x;                   // [num_tokens, hidden], rows x_row_stride elements apart
  const std::int32_t* expert_ids;  // [num_tokens, top_k] ascending in each row
  const float* weights;            // [num_tokens, top_k]
  const float* gammas;             // [num_tokens, num_shared]
  const void* gate_up;             // [num_tokens, top_k + num_shared, 2 width]
  const void* w13;                 // [num_experts + num_shared, 2 width, hidden], as it is trained
  const void* w2;                  // [num_experts + num_shared, hidden, width]
  void* dx;                        // [num_tokens, hidden], or null
  float* dx_sum;                   // [num_tokens, hidden] workspace; may be dx if that is fp32
  float* dweights;                 // [num_tokens, top_k]
  float* dgammas;                  // [num_tokens, num_shared]
  void* dw13;                      // like w13, or null with dw2
  void* dw2;                       // like w2
  std::int64_t dy_row_stride;
  std::int64_t x_row_stride;
  std::int64_t num_tokens;
  std::int64_t hidden;
  std::int64_t width;
  std::int32_t num_experts;
  std::int32_t num_shared;
  std::int32_t top_k;
  DType dtype;
  int num_threads;
};

}  // namespace tml
