// The inner product of everything: rows of packed x against vectors of packed weights, one fp32
// accumulator per output, ascending k. A k-step is 32 bits of one output: two bf16 (odd element
// first, as VDPBF16PS) or one fp32. Tiling, threads and ISA move work around, never an addition.
#pragma once

#include <cstddef>

#include "core/contract.h"
#include "cpu/vec.h"

namespace tml::cpu::TML_ISA_NS {

using KStep = std::uint32_t;

#if TML_ISA_LEVEL >= 2
inline constexpr int kTileRows = 12;  // 12 x 2 accumulators of 32 registers
inline constexpr int kWideRows = 6;   // up to here four vectors run together
#elif TML_ISA_LEVEL == 1
inline constexpr int kTileRows = 4;
inline constexpr int kWideRows = 0;
#else
inline constexpr int kTileRows = 4;
inline constexpr int kWideRows = 0;
#endif

template <bool kBf16>
struct Steps;  // how sixteen k-steps multiply

template <>
struct Steps<false> {
  struct Weights {
    Vec w;
  };
  struct Input {
    Vec x;
  };
  static TML_INLINE Weights weights(const KStep* p) {
    return {load(reinterpret_cast<const float*>(p))};
  }
  static TML_INLINE Input input(KStep step) { return {set1(float_of(step))}; }
  static TML_INLINE Vec dot(Vec acc, const Weights& w, const Input& x) {
    return fma(w.w, x.x, acc);
  }
};

#if TML_ISA_LEVEL >= 3
template <>
struct Steps<true> {
  struct Weights {
    __m512bh w;
  };
  struct Input {
    __m512bh x;
  };
  static TML_INLINE Weights weights(const KStep* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
  static TML_INLINE Input input(KStep step) {
    return {(__m512bh)_mm512_set1_epi32(static_cast<int>(step))};
  }
  static TML_INLINE Vec dot(Vec acc, const Weights& w, const Input& x) {
    return {_mm512_dpbf16_ps(acc.v, w.w, x.x)};
  }
};
#else
template <>
struct Steps<true> {
  struct Weights {
    Vec even, odd;
  };
  struct Input {
    Vec even, odd;
  };
  static TML_INLINE Weights weights(const KStep* p) {
#if TML_ISA_LEVEL == 2
    const __m512i raw = _mm512_loadu_si512(p);
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16))},
            { _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(-65536))) }};
#elif TML_ISA_LEVEL == 1
    const __m256i lo = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i hi = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8));
    const __m256i mask = _mm256_set1_epi32(-65536);
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
             _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))},
            { _mm256_castsi256_ps(_mm256_and_si256(lo, mask)),
              _mm256_castsi256_ps(_mm256_and_si256(hi, mask)) }};
#else
    Weights out;
    for (int i = 0; i < 16; ++i) {
      out.even.v[i] = float_of(p[i] << 16);
      out.odd.v[i] = float_of(p[i] & 0xffff0000u);
    }
    return out;
#endif
  }
  static TML_INLINE Input input(KStep step) {
    return {set1(float_of(step << 16)), set1(float_of(step & 0xffff0000u))};
  }
  static TML_INLINE Vec dot(Vec acc, const Weights& w, const Input& x) {
    return fma(w.even, x.even, fma(w.odd, x.odd, acc));
  }
};
#endif

TML_INLINE void prefetch_l2(const void* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
}

// acc[m][v] += sum over k of x[k * x_stride + m] * w[v][k * w_stride + lane]. `ahead`, if set, is
// the memory the thread reads next: `kAhead` lines of it are requested per k-step.
template <bool kBf16, int kRows, int kVecs, int kAhead>
TML_INLINE void panel_tile(const KStep* const (&w)[kVecs], std::ptrdiff_t w_stride, const KStep* x,
                           std::ptrdiff_t x_stride, std::int64_t num_steps,
                           Vec (&acc)[kRows][kVecs], const KStep* ahead = nullptr) {
  using S = Steps<kBf16>;
  for (std::int64_t k = 0; k < num_steps; ++k) {
    typename S::Weights weights[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) weights[v] = S::weights(w[v] + k * w_stride);
    if constexpr (kAhead > 0) {
#pragma GCC unroll 2
      for (int line = 0; line < kAhead; ++line) prefetch_l2(ahead + (k * kAhead + line) * 16);
    }
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const typename S::Input input = S::input(x[k * x_stride + m]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[m][v] = S::dot(acc[m][v], weights[v], input);
    }
  }
}

}  // namespace tml::cpu::TML_ISA_NS
