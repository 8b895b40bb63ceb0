// The products of attention: query rows against a page of keys, probabilities against a page of
// values. Rows are kRowSteps k-steps apart, a constant, so that the broadcasts of a tile share one
// address register and neither q nor p is ever transposed.
#pragma once

#include "cpu/panel_rows.h"

// A lambda that is called from every element of an unrolled tile and must not become a call.
#define TML_LAMBDA __attribute__((always_inline))

namespace tml::cpu::TML_ISA_NS {

// 128 k-steps (head_dim of fp32, keys of a unit) and one cache line more: neighbouring rows start
// in different sets of the L1 cache.
inline constexpr std::ptrdiff_t kRowSteps = 144;

// Memory this thread reads next: requested evenly while a product runs.
struct Ahead {
  const void* data = nullptr;
  std::int64_t num_bytes = 0;
};

TML_INLINE KStep read_step(const KStep* p) {
  KStep step;  // a row holds fp32 or pairs of bf16
  std::memcpy(&step, p, sizeof(step));
  return step;
}

template <bool kBf16, int kRows, int kVecs, bool kRequest, class Emit>
TML_INLINE void multiply_tile(const KStep* w, std::ptrdiff_t w_stride, const KStep* x,
                              std::int64_t num_steps, const char*& next, std::ptrdiff_t next_step,
                              const Emit& emit) {
  using S = Steps<kBf16>;
  Vec acc[kRows][kVecs];
  for (auto& row : acc)
    for (Vec& a : row) a = zero();
  for (std::int64_t k = 0; k < num_steps; ++k) {
    typename S::Weights weights[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) weights[v] = S::weights(w + v * 16);
    w += w_stride;
    if constexpr (kRequest) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) prefetch_l2(next + v * next_step);
      next += kVecs * next_step;
    }
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const typename S::Input input = S::input(read_step(x + m * kRowSteps + k));
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[m][v] = S::dot(acc[m][v], weights[v], input);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) emit(m, v, acc[m][v]);
}

template <bool kBf16, int kVecs, bool kRequest, class Emit>
TML_INLINE void multiply_tile(int num_rows, const KStep* w, std::ptrdiff_t w_stride, const KStep* x,
                              std::int64_t num_steps, const char*& next, std::ptrdiff_t next_step,
                              const Emit& emit) {
  switch (num_rows) {
#define TML_ROWS(rows)                                                                           \
  case rows:                                                                                     \
    if constexpr (rows <= (kVecs == 4 ? kWideRows : kTileRows))                                  \
      multiply_tile<kBf16, rows, kVecs, kRequest>(w, w_stride, x, num_steps, next, next_step, emit); \
    break;
    TML_ROWS(1) TML_ROWS(2) TML_ROWS(3) TML_ROWS(4) TML_ROWS(5) TML_ROWS(6)
    TML_ROWS(7) TML_ROWS(8) TML_ROWS(9) TML_ROWS(10) TML_ROWS(11) TML_ROWS(12)
#undef TML_ROWS
    default:
      break;
  }
}

// emit(row, vec, acc): acc = sum over k of x[row][k] * w[k * w_stride + 16 * vec + lane]. Columns
// are the outer loop: a run of them stays in the L1 cache for all rows.
template <bool kBf16, bool kRequest, class Emit>
TML_INLINE void multiply_rows(const KStep* w, std::ptrdiff_t w_stride, int num_vecs, const KStep* x,
                              int num_rows, std::int64_t num_steps, Ahead ahead, const Emit& emit) {
  const TileSplit tiles(num_rows);
  const std::int64_t num_lines = num_vecs * tiles.count * num_steps;
  const auto* next = static_cast<const char*>(ahead.num_bytes > 0 ? ahead.data : w);
  const std::ptrdiff_t next_step = num_lines > 0 ? ahead.num_bytes / num_lines : 0;
  int vec = 0;
  if (num_rows <= kWideRows)
    for (; vec + 4 <= num_vecs; vec += 4)
      multiply_tile<kBf16, 4, kRequest>(
          num_rows, w + vec * 16, w_stride, x, num_steps, next, next_step,
          [&](int m, int v, Vec acc) TML_LAMBDA { emit(m, vec + v, acc); });
  for (; vec < num_vecs; vec += 2)
    for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
      const int first = static_cast<int>(tiles.begin(tile));
      const auto emit_tile = [&](int m, int v, Vec acc) TML_LAMBDA { emit(first + m, vec + v, acc); };
      const KStep* tile_x = x + first * kRowSteps;
      if (vec + 2 <= num_vecs)
        multiply_tile<kBf16, 2, kRequest>(tiles.rows(tile), w + vec * 16, w_stride, tile_x,
                                          num_steps, next, next_step, emit_tile);
      else
        multiply_tile<kBf16, 1, kRequest>(tiles.rows(tile), w + vec * 16, w_stride, tile_x,
                                          num_steps, next, next_step, emit_tile);
    }
}

}  // namespace tml::cpu::TML_ISA_NS
