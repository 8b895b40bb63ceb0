// hmlp_fold: cells of a patch merged into channels, as rows that a projection takes.
//   y[((p T' + t) S' + h) S' + w, ((dt F + dh) F + dw) C + c]
//     = round(x[p, t D + dt, h F + dh, w F + dw, c]),  T' = frames / D, S' = side / F
// y is bf16, its columns past D F F C zero up to the row stride. On the CPU torch does this
// (tml_core.ops.hmlp.fold_timespace).
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tml {

struct HmlpFoldParams {
  const void* x;              // [num_patches, frames, side, side, channels], dtype
  void* y;                    // [num_patches T' S' S', y_row_stride], bf16
  std::int64_t y_row_stride;  // a multiple of 8
  std::int64_t num_patches;
  std::int32_t frames, side, channels;
  std::int32_t frame_fold, side_fold;  // D, F
  DType dtype;                         // fp32 or bf16
};

}  // namespace tml
