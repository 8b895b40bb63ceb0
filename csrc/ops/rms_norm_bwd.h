// rms_norm_bwd: the gradients of rms_norm (ops/rms_norm.h). With x^ = x * rstd and n = round(x^):
//   dy goes back through gelu (at the rounded value that went in) and the divisor to e, in fp32
//   dx = round(rstd * (e * weight - x^ * mean(e * weight * x^)))      the mean in sixteen lanes
//   dweight[c] = sum over rows of e * n: blocks of kGradBlock rows, each an fma chain from 0 over
//   ascending rows; blocks are added to 0 in ascending order; one rounding to the type of dweight.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tml {

struct RmsNormBwdParams {
  const void* dy;      // [num_rows, dim], rows dy_row_stride elements apart
  const void* x;       // [num_rows, dim], rows x_row_stride elements apart
  const void* weight;  // [dim]
  void* dx;            // [num_rows, dim], rows dx_row_stride elements apart
  void* dweight;       // [dim]
  std::int64_t dy_row_stride;
  std::int64_t x_row_stride;
  std::int64_t dx_row_stride;
  std::int64_t num_rows;
  std::int64_t dim;
  float eps;
  float divisor;  // 1: no division
  bool use_gelu;
  DType dtype;  // of everything: kBf16 or kF32
  int num_threads;
};

}  // namespace tml
