// linear: y[t, n] = sum_k x[t, k] * w[n, k]
// One fp32 accumulator per output, ascending k (bf16: odd element of a pair first), one rounding to
// the type of y. `weight` is packed by pack_weight: [panels][k_steps][32] k-steps.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tml {

struct LinearParams {
  const void* x;  // [num_tokens, in_dim], rows x_row_stride elements apart
  const void* weight;
  void* y;  // [num_tokens, out_dim], rows y_row_stride elements apart
  std::int64_t x_row_stride;
  std::int64_t y_row_stride;
  std::int64_t num_tokens;
  std::int64_t in_dim;
  std::int64_t out_dim;
  DType dtype;    // of x and weight: kBf16 or kF32
  DType y_dtype;  // kF32, or dtype
  int num_threads;
};

// pack_weight: w[n, k] (rows w_row_stride apart) -> panels of 32 outputs, zero-padded in n and k.
struct PackWeightParams {
  const void* w;
  void* packed;
  std::int64_t w_row_stride;
  std::int64_t out_dim;
  std::int64_t in_dim;
  DType dtype;
  int num_threads;
};

}  // namespace tml
