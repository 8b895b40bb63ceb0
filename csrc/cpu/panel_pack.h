// Plain matrices into k-steps. Along rows (a step is two neighbours of one row) it is a transpose
// of 32-bit words; across rows (a step is one column of two rows) it is an interleave.
#pragma once

#include "cpu/panel_rows.h"

namespace tml::cpu::TML_ISA_NS {

// How far ahead of its use a line of a plain matrix is requested: neighbouring lines belong to rows
// far apart, which the hardware does not foresee. Along a row, in k-steps; down a column, in rows.
inline constexpr int kAheadSteps = 64;
inline constexpr int kAheadRows = 16;

#if TML_ISA_LEVEL >= 2
TML_INLINE void transpose16(__m512i (&r)[16]) {
  __m512i t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88);
    const __m512i even_high = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd);
    const __m512i odd_high = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);
    r[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    r[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    r[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}
#endif

// One panel of up to 32 rows of w: out[k * 32 + row] = k-step k of the row, zero past num_rows.
template <class T>
void pack_panel_of_rows(const T* w, std::int64_t row_stride, int num_rows, std::int64_t in_dim,
                        KStep* out) {
  constexpr int kPanel = contract::kPanel;
  constexpr int kPerStep = 4 / sizeof(T);
  const std::int64_t num_steps = ceil_div(in_dim, kPerStep);
  std::int64_t k = 0;
#if TML_ISA_LEVEL >= 2
  for (; (k + 16) * kPerStep <= in_dim; k += 16)
    for (int half = 0; half < kPanel; half += 16) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        const T* line = w + (half + i) * row_stride + k * kPerStep;
        if (half + i < num_rows) prefetch_l2(line + kAheadSteps * kPerStep);
        r[i] = half + i < num_rows ? _mm512_loadu_si512(line) : _mm512_setzero_si512();
      }
      transpose16(r);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (k + i) * kPanel + half, r[i]);
    }
#endif
  for (; k < num_steps; ++k)
    for (int row = 0; row < kPanel; ++row)
      out[k * kPanel + row] = row < num_rows ? k_step(w + row * row_stride, k, in_dim) : 0u;
}

// out[i] = (even[i], odd[i]) for i < count, then zeros up to `width` <= 16. odd may be null: zeros.
TML_INLINE void interleave(const std::uint16_t* even, const std::uint16_t* odd, int count,
                           int width, KStep* out) {
#if TML_ISA_LEVEL >= 2
  const __mmask16 mask = lane_mask(count);
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even));
  const __m512i high = odd == nullptr ? _mm512_setzero_si512()
                                      : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, odd));
  _mm512_mask_storeu_epi32(out, lane_mask(width),
                           _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
  for (int i = 0; i < width; ++i)
    out[i] = i >= count ? 0u : even[i] | (odd == nullptr ? 0u : static_cast<KStep>(odd[i]) << 16);
#endif
}

// The k-step `step` of `count` columns of a matrix of num_rows rows: k runs down the rows.
TML_INLINE void column_steps(const std::uint16_t* first, std::int64_t row_stride,
                             std::int64_t num_rows, std::int64_t step, int count, int width,
                             KStep* out) {
  const std::uint16_t* even = first + 2 * step * row_stride;
  interleave(even, 2 * step + 1 < num_rows ? even + row_stride : nullptr, count, width, out);
}
TML_INLINE void column_steps(const float* first, std::int64_t row_stride, std::int64_t,
                             std::int64_t step, int count, int width, KStep* out) {
  store_first(reinterpret_cast<float*>(out), load_first(first + step * row_stride, count), width);
}

// num_panels panels of 32 columns each, from the column at `first` on, num_columns of them present:
// out[panel][k * 32 + column].
template <class T>
void pack_panels_of_columns(const T* first, std::int64_t row_stride, std::int64_t num_rows,
                            std::int64_t num_columns, std::int64_t num_panels, KStep* out) {
  constexpr std::int64_t kPanel = contract::kPanel;
  constexpr std::int64_t kPerStep = 4 / sizeof(T);
  const std::int64_t num_steps = ceil_div(num_rows, kPerStep);
  for (std::int64_t k = 0; k < num_steps; ++k)
    for (std::int64_t column = 0; column < num_panels * kPanel; column += 16) {
      const std::int64_t left = num_columns - column;
      const std::int64_t ahead = k * kPerStep + kAheadRows;
      if (left > 0 && ahead + 1 < num_rows && (kPerStep == 1 || column % kPanel == 0))
        for (std::int64_t row = ahead; row < ahead + kPerStep; ++row)
          prefetch_l2(first + row * row_stride + column);
      KStep* target = out + (column / kPanel * num_steps + k) * kPanel + column % kPanel;
      column_steps(first + column, row_stride, num_rows, k,
                   left >= 16 ? 16 : (left > 0 ? static_cast<int>(left) : 0), 16, target);
    }
}

}  // namespace tml::cpu::TML_ISA_NS
