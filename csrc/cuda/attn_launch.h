// The launch of session_attn for one head size; instantiated one to a file.
#pragma once

#include "cuda/attn.h"

namespace tml::cuda {

template <int kDim>
void session_attn_sized(const AttnParams& params, const Launch& launch) {
  const unsigned units =
      static_cast<unsigned>(params.num_tiles) * static_cast<unsigned>(params.op.kv.num_kv_heads);
  launch_kernel("session_attn", launch, session_attn_kernel<kDim>,
                units * static_cast<unsigned>(params.num_parts), kAttnThreads,
                AttnShared<kDim>::kBytes, params);
  if (params.num_parts > 1)
    launch_kernel("session_attn", launch, session_attn_fold_kernel<kDim>, units, kAttnThreads, 0,
                  params);
}

}  // namespace tml::cuda
