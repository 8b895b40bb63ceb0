// Rows of a model's hidden size held by one block: kRowThreads threads, thread j owning the groups
// of eight elements j, j + kRowThreads, ... A sum over a row is, on any row: per thread an fma
// chain in ascending order, the tree of warp_sum, then the eight warps' sums
// ((0+1)+(2+3))+((4+5)+(6+7)).
#pragma once

#include "cuda/launch.h"
#include "cuda/math.h"

namespace tml::cuda {

inline constexpr int kRowThreads = 256;
inline constexpr int kRowSharedBytes = kRowThreads / 32 * 4;

// Eight elements as fp32; those at or past `count` are zero. A full group of an aligned row is one
// access of sixteen (bf16) or two (fp32).
TML_DEVICE void load_eight(float (&v)[8], const std::uint16_t* p, std::int64_t count,
                           bool is_aligned) {
  if (is_aligned && count >= 8) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    const std::uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = low_bf16(words[i]);
      v[2 * i + 1] = high_bf16(words[i]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = i < count ? low_bf16(p[i]) : 0.0f;
}
TML_DEVICE void load_eight(float (&v)[8], const float* p, std::int64_t count, bool is_aligned) {
  if (is_aligned && count >= 8) {
    const float4 a = *reinterpret_cast<const float4*>(p);
    const float4 b = *reinterpret_cast<const float4*>(p + 4);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = i < count ? p[i] : 0.0f;
}
TML_DEVICE void store_eight(std::uint16_t* p, const float (&v)[8], std::int64_t count,
                            bool is_aligned) {
  if (is_aligned && count >= 8) {
    *reinterpret_cast<uint4*>(p) = uint4{pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]),
                                         pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) p[i] = static_cast<std::uint16_t>(pack_bf16(v[i], 0.0f));
}
TML_DEVICE void store_eight(float* p, const float (&v)[8], std::int64_t count, bool is_aligned) {
  if (is_aligned && count >= 8) {
    *reinterpret_cast<float4*>(p) = float4{v[0], v[1], v[2], v[3]};
    *reinterpret_cast<float4*>(p + 4) = float4{v[4], v[5], v[6], v[7]};
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) p[i] = v[i];
}

TML_DEVICE float as_float(float x) { return x; }
TML_DEVICE float as_float(std::uint16_t x) { return low_bf16(x); }

// To the type of the row and back: a rounding point kept in registers.
template <class T>
TML_DEVICE float round_as(float x);
template <>
TML_DEVICE float round_as<float>(float x) {
  return x;
}
template <>
TML_DEVICE float round_as<std::uint16_t>(float x) {
  return round_to_bf16(x);
}

template <class T>
inline bool is_row_aligned(const T* p, std::int64_t row_stride) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0 && row_stride * sizeof(T) % 16 == 0;
}

// body(first element, count of the group): the groups of this thread.
template <class Body>
TML_DEVICE void each_group(std::int64_t dim, const Body& body) {
  for (std::int64_t i = threadIdx.x * 8; i < dim; i += kRowThreads * 8) body(i, dim - i);
}

// The sum over the block, in every thread. `shared` may be used again after the next barrier.
TML_DEVICE float row_sum(float x, float* shared) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  const float a = __fadd_rn(__fadd_rn(shared[0], shared[1]), __fadd_rn(shared[2], shared[3]));
  const float b = __fadd_rn(__fadd_rn(shared[4], shared[5]), __fadd_rn(shared[6], shared[7]));
  return __fadd_rn(a, b);
}

TML_DEVICE float rstd_of(float squares, std::int64_t dim, float eps) {
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(squares, static_cast<float>(dim)), eps)));
}

// weight * round(x * rstd), rounded.
template <class T>
TML_DEVICE float normed(float x, float weight, float rstd) {
  return round_as<T>(__fmul_rn(weight, round_as<T>(__fmul_rn(x, rstd))));
}

// y = rms_norm(x) of one row. after(value) -> value to store. x may be y: a thread reads what it
// wrote itself only.
template <class T, class After>
TML_DEVICE void rms_norm_row(const T* x, const T* weight, T* y, std::int64_t dim, float eps,
                             bool is_aligned, float* shared, const After& after) {
  float squares = 0.0f;
  each_group(dim, [&](std::int64_t i, std::int64_t count) {
    float v[8];
    load_eight(v, x + i, count, is_aligned);
#pragma unroll
    for (int j = 0; j < 8; ++j) squares = __fmaf_rn(v[j], v[j], squares);
  });
  const float rstd = rstd_of(row_sum(squares, shared), dim, eps);
  each_group(dim, [&](std::int64_t i, std::int64_t count) {
    float v[8], w[8];
    load_eight(v, x + i, count, is_aligned);
    load_eight(w, weight + i, count, is_aligned);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = after(normed<T>(v[j], w[j], rstd));
    store_eight(y + i, v, count, is_aligned);
  });
}

}  // namespace tml::cuda
