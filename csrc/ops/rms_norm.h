// rms_norm: y = weight * (x / sqrt(mean(x^2) + eps)), then optionally / divisor, then gelu.
// The sum of squares runs in sixteen lanes (lane j: fma over elements j, j + 16, ...), then a
// halving tree. Rounding points, to the type of x: x * rstd; times weight; over divisor; gelu.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tml {

struct RmsNormParams {
  const void* x;       // [num_rows, dim], rows x_row_stride elements apart
  const void* weight;  // [dim]
  void* y;             // [num_rows, dim], rows y_row_stride elements apart; may be x
  std::int64_t x_row_stride;
  std::int64_t y_row_stride;
  std::int64_t num_rows;
  std::int64_t dim;
  float eps;
  float divisor;  // 1: no division
  bool use_gelu;
  DType dtype;  // of x, weight and y: kBf16 or kF32
  int num_threads;
};

}  // namespace tml
