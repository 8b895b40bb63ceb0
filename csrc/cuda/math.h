// Scalar functions of the kernels. The same fixed polynomials as the CPU's (cpu/vec.h), in explicit
// operations: no approximate unit of the device decides a bit, and the host computes them alike.
#pragma once

#include "cuda/ptx.h"

namespace tml::cuda {

TML_DEVICE float bits_to_float(std::uint32_t bits) {
  return __int_as_float(static_cast<int>(bits));
}
TML_DEVICE std::uint32_t float_to_bits(float x) {
  return static_cast<std::uint32_t>(__float_as_int(x));
}
TML_DEVICE float low_bf16(std::uint32_t pair) { return bits_to_float(pair << 16); }
TML_DEVICE float high_bf16(std::uint32_t pair) { return bits_to_float(pair & 0xffff0000u); }
TML_DEVICE float round_to_bf16(float x) { return low_bf16(pack_bf16(x, 0.0f)); }

// e^x within 2 ulp on [-87, 88.3].
TML_DEVICE float exp_in_range(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = __fmaf_rn(x, 1.44269504088896341f, magic);
  const float n = __fadd_rn(shifted, -magic);
  float r = __fmaf_rn(n, -0.693359375f, x);
  r = __fmaf_rn(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = __fmaf_rn(p, r, 1.3981999507e-3f);
  p = __fmaf_rn(p, r, 8.3334519073e-3f);
  p = __fmaf_rn(p, r, 4.1665795894e-2f);
  p = __fmaf_rn(p, r, 1.6666665459e-1f);
  p = __fmaf_rn(p, r, 5.0000001201e-1f);
  const float y = __fadd_rn(__fmaf_rn(p, __fmul_rn(r, r), r), 1.0f);
  const float scale = bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
  return __fmul_rn(y, scale);
}

// e^x; exactly 0 below -87, saturated above 88.3, NaN kept.
TML_DEVICE float exp_poly(float x) {
  float clamped = -87.0f > x ? -87.0f : x;
  clamped = 88.3f < clamped ? 88.3f : clamped;
  return x < -87.0f ? 0.0f : exp_in_range(clamped);
}

// The same bits for x <= 0, without the clamps that change nothing there.
TML_DEVICE float exp_negative(float x) { return x < -87.0f ? 0.0f : exp_in_range(x); }

// ln x within 2 ulp for positive normal x; NaN stays NaN.
TML_DEVICE float log_poly(float x) {
  if (x != x) return x;
  const std::uint32_t bits = float_to_bits(x);
  int exponent = static_cast<int>(bits >> 23) - 126;
  float m = bits_to_float((bits & 0x007fffffu) | 0x3f000000u);  // [0.5, 1)
  if (m < 0.707106781186547524f) {
    exponent -= 1;
    m = __fadd_rn(__fadd_rn(m, m), -1.0f);
  } else {
    m = __fadd_rn(m, -1.0f);
  }
  const float z = __fmul_rn(m, m);
  float p = 7.0376836292e-2f;
  p = __fmaf_rn(p, m, -1.1514610310e-1f);
  p = __fmaf_rn(p, m, 1.1676998740e-1f);
  p = __fmaf_rn(p, m, -1.2420140846e-1f);
  p = __fmaf_rn(p, m, 1.4249322787e-1f);
  p = __fmaf_rn(p, m, -1.6668057665e-1f);
  p = __fmaf_rn(p, m, 2.0000714765e-1f);
  p = __fmaf_rn(p, m, -2.4999993993e-1f);
  p = __fmaf_rn(p, m, 3.3333331174e-1f);
  const float e = static_cast<float>(exponent);
  float y = __fmul_rn(__fmul_rn(p, m), z);
  y = __fmaf_rn(e, -2.12194440e-4f, y);
  y = __fmaf_rn(-0.5f, z, y);
  return __fmaf_rn(e, 0.693359375f, __fadd_rn(m, y));
}

TML_DEVICE float silu(float x) { return __fdiv_rn(x, __fadd_rn(1.0f, exp_poly(-x))); }

// erf by a rational minimax fit on [-4, 4], saturated outside.
TML_DEVICE float erf_poly(float x) {
  float c = -4.0f > x ? -4.0f : x;
  c = 4.0f < c ? 4.0f : c;
  const float z = __fmul_rn(c, c);
  float p = -2.72614225801306e-10f;
  p = __fmaf_rn(p, z, 2.77068142495902e-08f);
  p = __fmaf_rn(p, z, -2.10102402082508e-06f);
  p = __fmaf_rn(p, z, -5.69250639462346e-05f);
  p = __fmaf_rn(p, z, -7.34990630326855e-04f);
  p = __fmaf_rn(p, z, -2.95459980854025e-03f);
  p = __fmaf_rn(p, z, -1.60960333262415e-02f);
  float q = -1.45660718464996e-05f;
  q = __fmaf_rn(q, z, -2.13374055278905e-04f);
  q = __fmaf_rn(q, z, -1.68282697438203e-03f);
  q = __fmaf_rn(q, z, -7.37332916720468e-03f);
  q = __fmaf_rn(q, z, -1.42647390514189e-02f);
  return __fdiv_rn(__fmul_rn(c, p), q);
}

// x/2 (1 + erf(x / sqrt 2))
TML_DEVICE float gelu(float x) {
  const float half = __fmul_rn(x, 0.5f);
  return __fmaf_rn(half, erf_poly(__fmul_rn(x, 0.70710678118654752f)), half);
}

// Sum over the lanes of a warp, the same tree and so the same bits in every lane.
TML_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = __fadd_rn(x, __shfl_xor_sync(kFullMask, x, mask));
  return x;
}

}  // namespace tml::cuda
