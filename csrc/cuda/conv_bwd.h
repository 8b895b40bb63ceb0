// The gradients of y = x + conv(x) over packed sequences (contract: ops/sconv_norm_bwd.h).
#pragma once

#include "cuda/norm_bwd.h"
#include "cuda/step.h"

namespace tml::cuda {

// How many of the tokens before and after a token its convolution shares a sequence with: at
// most 3.
struct Neighbours {
  std::uint8_t before, after;
};

TML_DEVICE Neighbours neighbours_of(const std::int32_t* cu_tokens, std::int64_t num_seqs,
                                    std::int64_t token) {
  const std::int32_t seq = sequence_of(cu_tokens, static_cast<std::int32_t>(num_seqs), token);
  const std::int64_t before = token - cu_tokens[seq], after = cu_tokens[seq + 1] - 1 - token;
  return {static_cast<std::uint8_t>(before < kHistory ? before : kHistory),
          static_cast<std::uint8_t>(after < kHistory ? after : kHistory)};
}

// dx of one channel from g, the gradient of y, at the token (rows g_row_stride apart).
template <class T>
TML_DEVICE float conv_dx(const float* taps, const T* g, std::int64_t g_row_stride,
                         Neighbours near) {
  float next[contract::kConvTaps];
#pragma unroll
  for (int i = 0; i < contract::kConvTaps; ++i)
    next[i] = i <= near.after ? as_float(g[i * g_row_stride]) : 0.0f;
  float acc = 0.0f;
#pragma unroll
  for (int i = 0; i < contract::kConvTaps; ++i) acc = __fmaf_rn(taps[kHistory - i], next[i], acc);
  return __fadd_rn(acc, next[0]);
}

// Extends the chains of one channel's taps by a token.
template <class T>
TML_DEVICE void add_taps(float (&sums)[contract::kConvTaps], float g, const T* x,
                         std::int64_t x_row_stride, Neighbours near) {
#pragma unroll
  for (int back = 0; back < contract::kConvTaps; ++back)
    if (back <= near.before)
      sums[kHistory - back] =
          __fmaf_rn(g, as_float(x[-back * x_row_stride]), sums[kHistory - back]);
}

}  // namespace tml::cuda
