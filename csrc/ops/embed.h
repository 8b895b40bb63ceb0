// embed: y[t] = rms_norm(table[ids[t]]), by the contract of rms_norm.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tml {

struct EmbedParams {
  const std::int64_t* ids;  // [num_tokens], each in [0, rows of table): checked by the caller
  const void* table;        // [rows, dim], rows table_row_stride elements apart
  const void* weight;       // [dim]
  void* y;                  // [num_tokens, dim], rows y_row_stride elements apart
  std::int64_t table_row_stride;
  std::int64_t y_row_stride;
  std::int64_t num_tokens;
  std::int64_t dim;
  float eps;
  DType dtype;  // of table, weight and y: kBf16 or kF32
  int num_threads;
};

}  // namespace tml
