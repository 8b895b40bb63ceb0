// moe: y[t] = sum over chosen experts e of w[t, e] * f_e(x[t]) + sum over shared experts of g_s
//   f_e(x) = W2_e h,  h = round(silu(gate) * up),  gate | up = W13_e x
//   g_s(x) = W2_s h,  h = round(silu(gate) * up * gamma[t, s])
// Products are single fp32 chains in ascending k. Per token the experts are combined in ascending
// expert id (fma from 0), then the shared ones are added in order; one rounding to the type of y.
// gate_up, if asked for, keeps gate | up of every (token, expert), rounded to the type of x.
// A dense SwiGLU MLP is one expert that every token chooses, weighted by its output scale.
// w13 is packed in panels of sixteen gate rows and their sixteen up rows; width is padded to 16.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tml {

struct MoeParams {
  const void* x;                   // [num_tokens, hidden], rows x_row_stride elements apart
  const std::int32_t* expert_ids;  // [num_tokens, top_k] ascending in each row
  const float* weights;            // [num_tokens, top_k]
  const float* gammas;             // [num_tokens, num_shared]
  const void* w13;                 // [num_experts + num_shared] x [ceil(width/16)][k_steps][32]
  const void* w2;                  // [num_experts + num_shared] x [ceil(hidden/32)][k_steps][32]
  void* y;                         // [num_tokens, hidden], rows y_row_stride elements apart
  void* gate_up;                   // [num_tokens, top_k + num_shared, 2 width] for moe_bwd, or null
  std::int64_t x_row_stride;
  std::int64_t y_row_stride;
  std::int64_t num_tokens;
  std::int64_t hidden;
  std::int64_t width;
  std::int32_t num_experts;
  std::int32_t num_shared;
  std::int32_t top_k;
  DType dtype;
  int num_threads;
};

// pack_experts: dense matrices to the layout of MoeParams, padding zeroed.
struct PackExpertsParams {
  const void* gate_up;  // [num_matrices, 2 width, hidden] gate rows, then up rows
  const void* down;     // [num_matrices, hidden, width]
  void* w13;
  void* w2;
  std::int64_t num_matrices;
  std::int64_t hidden;
  std::int64_t width;
  DType dtype;
  int num_threads;
};

}  // namespace tml
