// dmel_embed: y[f] = rms_norm(sum over c of table[c * num_levels + bins[f, c]])
// The sum is fp32, starts at 0 and runs in ascending c; it is rounded once to the type of the
// table, then normalised by the contract of rms_norm.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tml {

struct DmelEmbedParams {
  const std::int32_t* bins;  // [num_frames, num_channels], each in [0, num_levels): checked by the
                             // caller
  const void* table;         // [num_channels * num_levels, dim], rows table_row_stride apart
  const void* weight;        // [dim]
  void* y;                   // [num_frames, dim], rows y_row_stride elements apart
  std::int64_t table_row_stride;
  std::int64_t y_row_stride;
  std::int64_t num_frames;
  std::int64_t num_channels;
  std::int64_t num_levels;
  std::int64_t dim;
  float eps;
  DType dtype;  // of table, weight and y: kBf16 or kF32
  int num_threads;
};

}  // namespace tml
