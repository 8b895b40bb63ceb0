// Heads held by a warp, four channels to a lane: what serving and training prologues share, so that
// both have the same bits.
#pragma once

#include "cuda/step.h"

namespace tml::cuda {

using Bf16 = std::uint16_t;

inline constexpr int kMaxHeadDim = 128;

// The lane's four channels of a head; zero past its end.
TML_DEVICE void load_four(float (&v)[4], const Bf16* head, int lane, std::int64_t dim) {
  const bool is_inside = lane * 4 < dim;
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = is_inside ? low_bf16(head[lane * 4 + i]) : 0.0f;
}
TML_DEVICE void store_four(Bf16* out, const float (&v)[4]) {
  *reinterpret_cast<uint2*>(out) = uint2{pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])};
}

TML_DEVICE void norm_four(float (&v)[4], const Bf16* weight, int lane, std::int64_t dim,
                          float eps) {
  float squares = 0.0f, w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) squares = __fmaf_rn(v[i], v[i], squares);
  const float rstd = rstd_of(warp_sum(squares), dim, eps);
  load_four(w, weight, lane, dim);
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = normed<Bf16>(v[i], w[i], rstd);
}

TML_DEVICE float log_tau(std::int64_t position, float floor, float alpha) {
  const float ratio = __fdiv_rn(static_cast<float>(position + 1), floor);
  return ratio > 1.0f ? __fadd_rn(1.0f, __fmul_rn(alpha, log_poly(ratio))) : 1.0f;
}

}  // namespace tml::cuda
