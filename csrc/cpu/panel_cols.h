// Matrices packed along their rows: k runs over rows, outputs over columns. Products with a
// transposed weight (k = its outputs) and products over tokens (k = tokens) read their operands
// this way; multiply_tiles does the rest.
#pragma once

#include "cpu/panel_rows.h"
#include "cpu/parallel.h"

namespace tml::cpu::TML_ISA_NS {

// Rows of T that make one k-step.
template <class T>
inline constexpr std::int64_t kStepRows = sizeof(T) == 2 ? 2 : 1;

// out[i] = the k-step of column i, i < count <= 16; zero past `rest` columns. `odd` may be null.
TML_INLINE void pack_column_step(KStep* out, const float* even, const float*, std::int64_t rest,
                                 int count) {
  const Vec step = load_rest(even, rest);
  if (count == 16)
    store(reinterpret_cast<float*>(out), step);
  else
    store_first(reinterpret_cast<float*>(out), step, count);
}
TML_INLINE void pack_column_step(KStep* out, const std::uint16_t* even, const std::uint16_t* odd,
                                 std::int64_t rest, int count) {
#if TML_ISA_LEVEL >= 2
  const __mmask16 real = rest >= 16 ? 0xffff : lane_mask(static_cast<int>(rest));
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(real, even));
  const __m512i high =
      _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd == nullptr ? 0 : real, odd));
  _mm512_mask_storeu_epi32(out, lane_mask(count),
                           _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
  if (rest >= count && odd != nullptr) {
    for (int i = 0; i < count; ++i) out[i] = even[i] | static_cast<KStep>(odd[i]) << 16;
    return;
  }
  for (int i = 0; i < count; ++i) {
    const KStep high = i < rest && odd != nullptr ? odd[i] : 0u;
    out[i] = (i < rest ? even[i] : 0u) | high << 16;
  }
#endif
}

// K-steps `steps` of a matrix of num_rows rows as weight panels: [panel][num_steps][32].
template <class T, class RowOf>
void pack_column_panels(KStep* out, std::int64_t num_steps, Range steps, std::int64_t num_rows,
                        std::int64_t num_cols, const RowOf& row_of) {
  constexpr std::int64_t kPanel = contract::kPanel;
  for (std::int64_t k = steps.begin; k < steps.end; ++k) {
    const std::int64_t row = k * kStepRows<T>;
    const T* even = row_of(row);
    const T* odd = row + 1 < num_rows && kStepRows<T> == 2 ? row_of(row + 1) : nullptr;
    for (std::int64_t col = 0; col < num_cols; col += kPanel) {
      KStep* step = out + col * num_steps + k * kPanel;
      for (std::int64_t half = col; half < col + kPanel; half += 16, step += 16) {
        const std::int64_t at = std::min(half, num_cols);
        pack_column_step(step, even + at, odd == nullptr ? odd : odd + at, num_cols - at, 16);
      }
    }
  }
}

// The same as the tiles of multiply_tiles, a "row" of it being a column of the matrix.
template <class T, class RowOf>
void pack_column_tiles(KStep* out, std::int64_t num_steps, Range steps, std::int64_t num_rows,
                       std::int64_t num_cols, const RowOf& row_of) {
  if (num_cols == 0) return;
  const TileSplit tiles(num_cols);
  for (std::int64_t k = steps.begin; k < steps.end; ++k) {
    const std::int64_t row = k * kStepRows<T>;
    const T* even = row_of(row);
    const T* odd = row + 1 < num_rows && kStepRows<T> == 2 ? row_of(row + 1) : nullptr;
    for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
      const std::int64_t col = tiles.begin(tile);
      const int count = tiles.rows(tile);
      pack_column_step(out + col * num_steps + k * count, even + col,
                       odd == nullptr ? odd : odd + col, num_cols - col, count);
    }
  }
}

}  // namespace tml::cpu::TML_ISA_NS
