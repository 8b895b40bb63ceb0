// sconv_norm_bwd: the gradients of sconv_norm over whole sequences packed one after the other (zero
// state before each). Sequence s owns tokens [cu_tokens[s], cu_tokens[s + 1]).
//   dresidual = round(dsum + the dx of rms_norm_bwd at sum)    sum: the residual after the addition
//   dx[t] = round(g[t] + (an fma chain from 0 over w[3] g[t], w[2] g[t + 1], w[1] g[t + 2],
//                 w[0] g[t + 3])), g = dresidual, zero past the sequence
//   dconv[c, tap] = sum over t of g[t] * x[t - 3 + tap], dnorm as in rms_norm_bwd: blocks of
//   kGradBlock tokens of the batch, each an fma chain from 0 over ascending tokens; blocks are
//   added to 0 in ascending order; dconv stays fp32, dnorm is rounded to the type of x.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tml {

struct SconvNormBwdParams {
  const void* dnormed;            // [num_tokens, dim], rows dnormed_row_stride apart; null: no norm
  const void* dsum;               // [num_tokens, dim], rows dsum_row_stride apart
  const void* x;                  // [num_tokens, dim], rows x_row_stride elements apart
  const void* sum;                // [num_tokens, dim], rows sum_row_stride apart
  const float* conv_weight;       // [dim, 4] oldest tap first
  const void* norm_weight;        // [dim], or null: no norm
  const std::int32_t* cu_tokens;  // [num_seqs + 1]
  void* dx;                       // [num_tokens, dim] dense
  void* dresidual;                // [num_tokens, dim] dense
  float* dconv;                   // [dim, 4]
  void* dnorm;                    // [dim], or null: no norm
  std::int64_t dnormed_row_stride;
  std::int64_t dsum_row_stride;
  std::int64_t x_row_stride;
  std::int64_t sum_row_stride;
  std::int64_t num_seqs;
  std::int64_t num_tokens;
  std::int64_t dim;  // a multiple of 16
  float eps;
  DType dtype;  // of all but the fp32 weights and their gradient: kBf16 or kF32
  int num_threads;
};

}  // namespace tml
