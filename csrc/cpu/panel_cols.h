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

TML_INLINE KStep column_step(float even, float) { return bits_of(even); }
TML_INLINE KStep column_step(std::uint16_t even, std::uint16_t odd) {
  return static_cast<KStep>(even) | static_cast<KStep>(odd) << 16;
}

// out[i] = the k-step of column i, i < count <= 16; columns past `rest` are zero. `odd` may be
// null.
template <class T>
TML_INLINE void pack_column_step(KStep* out, const T* even, const T* odd, std::int64_t rest,
                                 int count) {
  alignas(64) KStep step[16];
  if (rest >= 16 && (odd != nullptr || kStepRows<T> == 1)) {
    const T* other = kStepRows<T> == 1 ? even : odd;
    for (int i = 0; i < 16; ++i) step[i] = column_step(even[i], other[i]);
  } else {
    for (int i = 0; i < 16; ++i)
      step[i] = i < rest ? column_step(even[i], odd != nullptr ? odd[i] : T{0}) : 0u;
  }
  const Vec lanes = load(reinterpret_cast<const float*>(step));
  if (count == 16)
    store(reinterpret_cast<float*>(out), lanes);
  else
    store_first(reinterpret_cast<float*>(out), lanes, count);
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
  const std::int64_t least = num_cols / tiles.count, extra = num_cols % tiles.count;
  for (std::int64_t k = steps.begin; k < steps.end; ++k) {
    const std::int64_t row = k * kStepRows<T>;
    const T* even = row_of(row);
    const T* odd = row + 1 < num_rows && kStepRows<T> == 2 ? row_of(row + 1) : nullptr;
    std::int64_t carry = 0;  // tiles.begin() without a division
    for (std::int64_t col = 0; col < num_cols;) {
      carry += extra;
      const bool more = carry >= tiles.count;
      if (more) carry -= tiles.count;
      const int count = static_cast<int>(least + (more ? 1 : 0));
      pack_column_step(out + col * num_steps + k * count, even + col,
                       odd == nullptr ? odd : odd + col, num_cols - col, count);
      col += count;
    }
  }
}

}  // namespace tml::cpu::TML_ISA_NS
