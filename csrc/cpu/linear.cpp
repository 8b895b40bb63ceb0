// linear: tokens are packed in tiles of up to 12 rows ([k_steps][rows]) so that one k-step of a
// tile is one cache line; a thread owns a range of weight panels and streams them once.
#include "ops/linear.h"

#include "cpu/cpu.h"
#include "cpu/panel_pack.h"
#include "cpu/parallel.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

constexpr std::int64_t kPanel = contract::kPanel;
// Below this much work a second thread costs more than it saves.
constexpr std::int64_t kMinParallelBytes = 96 << 10;

template <class T, class Y>
void linear_typed(const LinearParams& p) {
  const std::int64_t num_steps = num_k_steps(p.dtype, p.in_dim);
  const std::int64_t num_panels = ceil_div(p.out_dim, kPanel);
  const std::int64_t panel_steps = num_steps * kPanel;
  const auto* weight = static_cast<const KStep*>(p.weight);
  const auto* x = static_cast<const T*>(p.x);
  auto* y = static_cast<Y*>(p.y);
  const TileSplit tiles(p.num_tokens);
  auto* packed = static_cast<KStep*>(
      scratch(Scratch::kOp, static_cast<std::size_t>(p.num_tokens * num_steps) * sizeof(KStep)));
  const bool small = num_panels * panel_steps * 4 * tiles.count < kMinParallelBytes;
  parallel(small ? 1 : p.num_threads, [&](int thread, int num_threads) {
    const Range own_tiles = split(tiles.count, thread, num_threads);
    for (std::int64_t tile = own_tiles.begin; tile < own_tiles.end; ++tile)
      pack_rows<T>(packed + tiles.begin(tile) * num_steps, tiles.rows(tile), p.in_dim,
                   [&](int m) { return x + (tiles.begin(tile) + m) * p.x_row_stride; });
    team_barrier();
    const Range panels = split(num_panels, thread, num_threads);
    multiply_tiles<sizeof(T) == 2>(
        weight, num_steps, panels.begin, panels.end, packed, p.num_tokens,
        [&](std::int64_t t, std::int64_t panel, int vec, Vec acc) {
          const std::int64_t n = panel * kPanel + vec * 16;
          Y* out = y + t * p.y_row_stride + n;
          if (n + 16 <= p.out_dim)
            store_rounded(out, acc);
          else if (n < p.out_dim)
            store_first_rounded(out, acc, static_cast<int>(p.out_dim - n));
        });
  });
}

template <class T>
void pack_weight_typed(const PackWeightParams& p) {
  const std::int64_t num_steps = num_k_steps(p.dtype, p.in_dim);
  const std::int64_t num_panels = ceil_div(p.out_dim, kPanel);
  const auto* w = static_cast<const T*>(p.w);
  auto* packed = static_cast<KStep*>(p.packed);
  parallel(p.num_threads, [&](int thread, int num_threads) {
    const Range panels = split(num_panels, thread, num_threads);
    for (std::int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int rows = static_cast<int>(std::min(kPanel, p.out_dim - panel * kPanel));
      pack_panel_of_rows(w + panel * kPanel * p.w_row_stride, p.w_row_stride, rows, p.in_dim,
                         packed + panel * num_steps * kPanel);
    }
  });
}

}  // namespace

void linear(const LinearParams& p) {
  if (p.num_tokens == 0 || p.out_dim == 0) return;
  if (p.dtype == DType::kF32) return TML_F32(linear, linear_typed<float, float>)(p);
  if (p.y_dtype == DType::kF32) return linear_typed<std::uint16_t, float>(p);
  linear_typed<std::uint16_t, std::uint16_t>(p);
}

void pack_weight(const PackWeightParams& p) {
  if (p.dtype == DType::kF32) return TML_F32(pack_weight, pack_weight_typed<float>)(p);
  pack_weight_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
