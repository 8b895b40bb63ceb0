// embed_bwd and dmel_embed_bwd: the gradients of embed and dmel_embed. The norm goes back by the
// contract of rms_norm_bwd, its dx kept in fp32. A row of the table gets the sum over the tokens
// that read it: blocks of kGradBlock tokens of the batch, each summed from 0 over ascending tokens;
// blocks that hold such a token are added to 0 in ascending order; one rounding to the table's
// type.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tml {

struct EmbedBwdParams {
  const void* dy;           // [num_tokens, dim], rows dy_row_stride elements apart
  const std::int64_t* ids;  // [num_tokens], each in [0, num_ids): checked by the caller
  const void* table;        // [num_ids, dim], rows table_row_stride elements apart
  const void* weight;       // [dim]
  void* dtable;             // [num_ids, dim], rows dense; zero on entry
  void* dweight;            // [dim]
  std::int64_t dy_row_stride;
  std::int64_t table_row_stride;
  std::int64_t num_tokens;
  std::int64_t num_ids;
  std::int64_t dim;
  float eps;
  DType dtype;  // of dy, table, weight and their gradients: kBf16 or kF32
  int num_threads;
};

struct DmelEmbedBwdParams {
  const void* dy;            // [num_frames, dim], rows dy_row_stride elements apart
  const std::int32_t* bins;  // [num_frames, num_channels], each in [0, num_levels): checked by the
                             // caller
  const void* table;         // [num_channels * num_levels, dim], rows table_row_stride apart
  const void* weight;        // [dim]
  void* dtable;              // [num_channels * num_levels, dim], rows dense; zero on entry
  void* dweight;             // [dim]
  std::int64_t dy_row_stride;
  std::int64_t table_row_stride;
  std::int64_t num_frames;
  std::int64_t num_channels;
  std::int64_t num_levels;
  std::int64_t dim;
  float eps;
  DType dtype;  // of dy, table, weight and their gradients: kBf16 or kF32
  int num_threads;
};

}  // namespace tml
