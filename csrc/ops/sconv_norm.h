// sconv_norm: the end of a sub-layer over a step batch.
//   y = round(x + conv(x)); residual = round(residual + y); normed = rms_norm(residual)
// conv[t] is fp32: an fma chain over the taps, oldest input first, started at 0; then x[t] is
// added. The three inputs before a sequence's first new token are its rows of `conv`, which end up
// holding its last three inputs. rms_norm has its own contract; "round" is to the type of x.
#pragma once

#include "ops/step_batch.h"

namespace tml {

struct SconvNormParams {
  const void* x;             // [num_tokens, dim], rows x_row_stride elements apart
  void* residual;            // [num_tokens, dim], rows residual_row_stride apart; updated in place
  const float* conv_weight;  // [dim, 4] oldest tap first
  const void* norm_weight;   // [dim], or null: no norm
  void* normed;              // [num_tokens, dim], rows normed_row_stride apart; null without a norm
  StepBatch batch;           // start_pos and visible_end are not read
  ConvRows conv;
  std::int64_t x_row_stride;
  std::int64_t residual_row_stride;
  std::int64_t normed_row_stride;
  std::int64_t dim;  // a multiple of 16
  float eps;
  DType dtype;  // of x, residual, norm_weight, normed and conv: kBf16 or kF32
  int num_threads;
};

}  // namespace tml
