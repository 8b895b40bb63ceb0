// Products onto stored fp32 sums, the shape of every gradient: y[m][n] (op)= sum_k x[m, k] w[k, n].
// Chains run over ascending k exactly as in panel.h; tiling never changes a bit.
#pragma once

#include "cpu/panel_rows.h"

namespace tml::cpu::TML_ISA_NS {

enum class Onto {
  kStore,    // y = x . w
  kChain,    // the chain that y holds goes on over these k
  kPromote,  // y = y + (x . w): a finished block joins the sum of the blocks before it
};

// k-steps from one row of x to the next where rows are stored one after the other (up to 128
// k-steps and a cache line, so that neighbouring rows start in different sets of the L1 cache).
inline constexpr int kOntoRow = 144;

// x[m] starts at x + m * kRowStride, a k-step apart; kRowStride 1: x + m, x_stride apart.
template <bool kBf16, int kRowStride, int kRows, int kVecs>
TML_INLINE void onto_tile(float* y, std::ptrdiff_t y_stride, const KStep* w,
                          std::ptrdiff_t w_stride, const KStep* x, std::ptrdiff_t x_stride,
                          std::int64_t num_steps, Onto onto) {
  using S = Steps<kBf16>;
  Vec acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v)
      acc[m][v] = onto == Onto::kChain ? load(y + m * y_stride + v * 16) : zero();
  for (std::int64_t k = 0; k < num_steps; ++k) {
    typename S::Weights weights[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) weights[v] = S::weights(w + v * 16);
    w += w_stride;
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const typename S::Input input = S::input(x[m * kRowStride]);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) acc[m][v] = S::dot(acc[m][v], weights[v], input);
    }
    x += x_stride;
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      float* out = y + m * y_stride + v * 16;
      store(out, onto == Onto::kPromote ? add(load(out), acc[m][v]) : acc[m][v]);
    }
}

template <bool kBf16, int kRowStride, int kVecs>
TML_INLINE void onto_rows(int num_rows, float* y, std::ptrdiff_t y_stride, const KStep* w,
                          std::ptrdiff_t w_stride, const KStep* x, std::ptrdiff_t x_stride,
                          std::int64_t num_steps, Onto onto) {
  with_rows(num_rows, [&](auto rows) TML_LAMBDA {
    onto_tile<kBf16, kRowStride, decltype(rows)::value, kVecs>(y, y_stride, w, w_stride, x,
                                                               x_stride, num_steps, onto);
  });
}

// num_rows rows by num_vecs vectors of outputs. A run of columns stays in the L1 cache for all
// rows.
template <bool kBf16, int kRowStride>
void multiply_onto(float* y, std::ptrdiff_t y_stride, const KStep* w, std::ptrdiff_t w_stride,
                   int num_vecs, const KStep* x, std::ptrdiff_t x_stride, int num_rows,
                   std::int64_t num_steps, Onto onto) {
  const TileSplit tiles(num_rows);
  for (int vec = 0; vec < num_vecs; vec += 2)
    for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
      const std::int64_t first = tiles.begin(tile);
      float* tile_y = y + first * y_stride + vec * 16;
      const KStep* tile_x = x + first * kRowStride;
      if (vec + 2 <= num_vecs)
        onto_rows<kBf16, kRowStride, 2>(tiles.rows(tile), tile_y, y_stride, w + vec * 16, w_stride,
                                        tile_x, x_stride, num_steps, onto);
      else
        onto_rows<kBf16, kRowStride, 1>(tiles.rows(tile), tile_y, y_stride, w + vec * 16, w_stride,
                                        tile_x, x_stride, num_steps, onto);
    }
}

// The k-steps whose k are rows: `a` and `b` are sixteen columns of rows 2 i and 2 i + 1 (bf16: one
// vector of pairs) or of rows 2 i and 2 i + 1 (fp32: two vectors, `stride` apart).
TML_INLINE void store_step_rows(KStep* out, std::ptrdiff_t stride, Vec a, Vec b, float) {
  store(reinterpret_cast<float*>(out), a);
  store(reinterpret_cast<float*>(out + stride), b);
}
TML_INLINE void store_step_rows(KStep* out, std::ptrdiff_t, Vec a, Vec b, std::uint16_t) {
#if TML_ISA_LEVEL >= 2
  const __m512i low = _mm512_cvtepu16_epi32(pack_bf16(a));
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(pack_bf16(b)), 16);
  _mm512_storeu_si512(out, _mm512_or_si512(low, high));
#else
  alignas(64) std::uint16_t low[16], high[16];
  store_bf16(low, a);
  store_bf16(high, b);
  for (int i = 0; i < 16; ++i) out[i] = low[i] | static_cast<KStep>(high[i]) << 16;
#endif
}

// k-steps over num_rows rows, 16 num_vecs columns wide: out[step * stride + column]. `row_of(i)` is
// row i, or null for a row of zeros; columns past num_columns are zero.
template <class T, class RowOf>
void pack_step_rows(KStep* out, std::ptrdiff_t stride, std::int64_t num_rows, std::int64_t column,
                    std::int64_t num_columns, int num_vecs, const RowOf& row_of) {
  const auto part = [&](const T* row, std::int64_t at) {
    if (row == nullptr || at >= num_columns) return zero();
    const int count = static_cast<int>(std::min<std::int64_t>(16, num_columns - at));
    return count == 16 ? load_as_f32(row + at) : load_first_as_f32(row + at, count);
  };
  constexpr std::int64_t kStepsOfTwo = sizeof(T) == 2 ? 1 : 2;
  for (std::int64_t i = 0; i < num_rows; i += 2) {
    const T* a = row_of(i);
    const T* b = i + 1 < num_rows ? row_of(i + 1) : nullptr;
    KStep* steps = out + i / 2 * kStepsOfTwo * stride;
    for (int v = 0; v < num_vecs; ++v) {
      const Vec first = part(a, column + v * 16);
      if (sizeof(T) == 2 || i + 1 < num_rows)
        store_step_rows(steps + v * 16, stride, first, part(b, column + v * 16), T{});
      else
        store(reinterpret_cast<float*>(steps + v * 16), first);
    }
  }
}

}  // namespace tml::cpu::TML_ISA_NS
