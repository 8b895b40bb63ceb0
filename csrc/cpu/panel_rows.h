// Tiles of token rows against runs of weight panels: the shared middle of linear, MoE and the head.
#pragma once

#include <algorithm>

#include "core/memory.h"
#include "cpu/panel.h"

// A lambda inside of a tile's loops, which must not become a call.
#define TML_LAMBDA __attribute__((always_inline))

namespace tml::cpu::TML_ISA_NS {

// A tile has 1, 2, 3, 4, 6, 8 or 12 rows, up to kTileRows: each size is code of its own in every
// kernel. The largest that num_rows, at least 1, can fill.
constexpr int tile_size(std::int64_t num_rows) {
  int size = 1;
  for (int one : {2, 3, 4, 6, 8, 12})
    if (one <= num_rows && one <= kTileRows) size = one;
  return size;
}

// num_rows cut into tiles: full ones, then what is left in at most two. Of 12 + 2 and 12 + 4 rows
// two middling tiles are made: a small one has too few sums under way to hide the latency of each.
struct TileSplit {
  explicit TileSplit(std::int64_t num_rows)
      : num_full(num_rows / kTileRows), rest(static_cast<int>(num_rows % kTileRows)) {
    first_of_rest = rest > 0 ? tile_size(rest) : 0;
    if (kTileRows == 12 && num_full > 0 && (rest == 2 || rest == 4)) {
      num_full -= 1;
      rest += kTileRows;
      first_of_rest = 8;
    }
    count = num_full + (rest > 0) + (rest > first_of_rest);
  }
  std::int64_t begin(std::int64_t tile) const {
    if (tile <= num_full) return tile * kTileRows;
    return num_full * kTileRows + (tile == num_full + 1 ? first_of_rest : rest);
  }
  int rows(std::int64_t tile) const {
    return tile < num_full ? kTileRows : tile == num_full ? first_of_rest : rest - first_of_rest;
  }
  std::int64_t num_full;
  int rest, first_of_rest;
  std::int64_t count = 0;
};

template <int kRows>
struct Rows {
  static constexpr int value = kRows;
};

// body(Rows<num_rows>{}) for the size of a tile.
template <int kLargest = kTileRows, class Body>
TML_INLINE void with_rows(int num_rows, const Body& body) {
  if (num_rows == kLargest)
    body(Rows<kLargest>{});
  else if constexpr (kLargest > 1)
    with_rows<tile_size(kLargest - 1)>(num_rows, body);
}

// The k-step of one row: an fp32, or a pair of bf16 (zero past an odd end).
TML_INLINE KStep k_step(const float* row, std::int64_t k, std::int64_t) { return bits_of(row[k]); }
TML_INLINE KStep k_step(const std::uint16_t* row, std::int64_t k, std::int64_t in_dim) {
  if (2 * k + 1 < in_dim) {
    KStep step;
    std::memcpy(&step, row + 2 * k, 4);
    return step;
  }
  return row[2 * k];
}

// packed[k * num_rows + m] = k-step k of row_of(m).
template <class T, class RowOf>
void pack_rows(KStep* packed, int num_rows, std::int64_t in_dim, const RowOf& row_of) {
  const std::int64_t num_steps = sizeof(T) == 2 ? (in_dim + 1) / 2 : in_dim;
  for (int m = 0; m < num_rows; ++m) {
    const T* row = row_of(m);
    for (std::int64_t k = 0; k < num_steps; ++k) packed[k * num_rows + m] = k_step(row, k, in_dim);
  }
}

template <bool kBf16, int kRows, class Emit>
void multiply_panels_fixed(const KStep* weight, std::int64_t panel_steps, std::int64_t begin,
                           std::int64_t end, const KStep* x, std::int64_t num_steps,
                           const KStep* ahead, const Emit& emit) {
  constexpr std::ptrdiff_t kPanel = contract::kPanel;
  std::int64_t panel = begin;
  if constexpr (kRows <= kWideRows) {
    for (; panel + 2 <= end; panel += 2) {
      const KStep* first = weight + panel * panel_steps;
      const KStep* second = first + panel_steps;
      const KStep* const w[4] = {first, first + 16, second, second + 16};
      Vec acc[kRows][4];
      for (auto& row : acc)
        for (Vec& a : row) a = zero();
      panel_tile<kBf16, kRows, 4, 0>(w, kPanel, x, kRows, num_steps, acc);
      for (int m = 0; m < kRows; ++m)
        for (int v = 0; v < 4; ++v) emit(m, panel + v / 2, v % 2, acc[m][v]);
    }
  }
  for (; panel < end; ++panel) {
    const KStep* base = weight + panel * panel_steps;
    const KStep* const w[2] = {base, base + 16};
    Vec acc[kRows][2];
    for (auto& row : acc)
      for (Vec& a : row) a = zero();
    if constexpr (kRows >= kTileRows / 2) {
      if (ahead != nullptr) {
        panel_tile<kBf16, kRows, 2, 1>(w, kPanel, x, kRows, num_steps, acc, ahead);
        ahead += num_steps * 16;
      } else {
        panel_tile<kBf16, kRows, 2, 0>(w, kPanel, x, kRows, num_steps, acc);
      }
    } else {
      panel_tile<kBf16, kRows, 2, 0>(w, kPanel, x, kRows, num_steps, acc);
    }
    for (int m = 0; m < kRows; ++m)
      for (int v = 0; v < 2; ++v) emit(m, panel, v, acc[m][v]);
  }
}

// Every row of a packed tile times panels [begin, end); emit(row, panel, vec, acc) gets each vector
// of sixteen outputs once. `ahead`, if set, is memory to request meanwhile, one line per k-step.
template <bool kBf16, class Emit>
void multiply_panels(const KStep* weight, std::int64_t panel_steps, std::int64_t begin,
                     std::int64_t end, const KStep* x, int num_rows, std::int64_t num_steps,
                     const KStep* ahead, const Emit& emit) {
  with_rows(num_rows, [&](auto rows) TML_LAMBDA {
    multiply_panels_fixed<kBf16, decltype(rows)::value>(weight, panel_steps, begin, end, x,
                                                        num_steps, ahead, emit);
  });
}

// Panels a thread reuses across token tiles stay inside this many bytes of its L2 cache.
inline constexpr std::int64_t kReuseBytes = 384 << 10;

// Every tile of num_rows packed rows times panels [begin, end) of one weight: emit(row, panel, vec,
// acc). A panel is read from memory once; later tiles find it in the cache.
template <bool kBf16, class Emit>
void multiply_tiles(const KStep* weight, std::int64_t num_steps, std::int64_t begin,
                    std::int64_t end, const KStep* packed, std::int64_t num_rows,
                    const Emit& emit) {
  const TileSplit tiles(num_rows);
  const std::int64_t panel_steps = num_steps * contract::kPanel;
  const std::int64_t panel_bytes = panel_steps * static_cast<std::int64_t>(sizeof(KStep));
  // Two or three tiles: memory and arithmetic cost about the same, so while a panel is multiplied
  // the first two tiles request one half each of the panel that follows.
  const bool overlap = tiles.count == 2 || tiles.count == 3;
  const std::int64_t reuse = tiles.count == 1 ? end - begin
                             : overlap ? 1
                                       : std::max<std::int64_t>(1, kReuseBytes / panel_bytes);
  for (std::int64_t chunk = begin; chunk < end; chunk += reuse) {
    const std::int64_t chunk_end = std::min(chunk + reuse, end);
    const KStep* next = weight + chunk_end * panel_steps;
    for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
      const std::int64_t first = tiles.begin(tile);
      const bool request = overlap && tile < 2 && chunk_end < end;
      multiply_panels<kBf16>(
          weight, panel_steps, chunk, chunk_end, packed + first * num_steps, tiles.rows(tile),
          num_steps, request ? next + tile * (panel_steps / 2) : nullptr,
          [&](int m, std::int64_t panel, int vec, Vec acc) { emit(first + m, panel, vec, acc); });
    }
  }
}

// num_rows rows packed tile by tile into the thread's scratch, as multiply_tiles reads them.
template <class T, class RowOf>
const KStep* pack_tiles(std::int64_t num_rows, std::int64_t in_dim, const RowOf& row_of) {
  const std::int64_t num_steps = sizeof(T) == 2 ? (in_dim + 1) / 2 : in_dim;
  const TileSplit tiles(num_rows);
  auto* packed = static_cast<KStep*>(
      scratch(Scratch::kThread, static_cast<std::size_t>(num_rows * num_steps) * sizeof(KStep)));
  for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
    const std::int64_t first = tiles.begin(tile);
    pack_rows<T>(packed + first * num_steps, tiles.rows(tile), in_dim,
                 [&](int m) { return row_of(first + m); });
  }
  return packed;
}

}  // namespace tml::cpu::TML_ISA_NS
