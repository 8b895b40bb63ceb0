// Products on plain (unpacked) matrices, for training. w is [out_dim, in_dim].
// linear_plain: y = x @ w.T, the bits of linear.
// linear_dgrad: dx[t, k] = sum_n dy[t, n] * w[n, k]: one fp32 accumulator, ascending n (bf16: odd
//   element of a pair first), one rounding to the type of dx.
// linear_wgrad: dw[n, k] = sum_t dy[t, n] * x[t, k]: blocks of kGradBlock tokens, each one fp32
//   accumulator from 0 in ascending t (bf16: odd token of a pair first); blocks are added to 0 in
//   ascending order; one rounding to the type of dw.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tml {

struct LinearPlainParams {
  const void* x;  // [num_tokens, in_dim], rows x_row_stride elements apart
  const void* w;  // [out_dim, in_dim], rows w_row_stride elements apart
  void* y;        // [num_tokens, out_dim], rows y_row_stride elements apart
  std::int64_t x_row_stride;
  std::int64_t w_row_stride;
  std::int64_t y_row_stride;
  std::int64_t num_tokens;
  std::int64_t in_dim;
  std::int64_t out_dim;
  DType dtype;    // of x and w: kBf16 or kF32
  DType y_dtype;  // kF32, or dtype
  int num_threads;
};

struct LinearDgradParams {
  const void* dy;  // [num_tokens, out_dim], rows dy_row_stride elements apart
  const void* w;   // [out_dim, in_dim], rows w_row_stride elements apart
  void* dx;        // [num_tokens, in_dim], rows dx_row_stride elements apart
  std::int64_t dy_row_stride;
  std::int64_t w_row_stride;
  std::int64_t dx_row_stride;
  std::int64_t num_tokens;
  std::int64_t in_dim;
  std::int64_t out_dim;
  DType dtype;     // of dy and w: kBf16 or kF32
  DType dx_dtype;  // kF32, or dtype
  int num_threads;
};

struct LinearWgradParams {
  const void* dy;  // [num_tokens, out_dim], rows dy_row_stride elements apart
  const void* x;   // [num_tokens, in_dim], rows x_row_stride elements apart
  void* dw;        // [out_dim, in_dim], rows dw_row_stride elements apart
  std::int64_t dy_row_stride;
  std::int64_t x_row_stride;
  std::int64_t dw_row_stride;
  std::int64_t num_tokens;
  std::int64_t in_dim;
  std::int64_t out_dim;
  DType dtype;     // of dy and x: kBf16 or kF32
  DType dw_dtype;  // kF32, or dtype
  int num_threads;
};

}  // namespace tml
