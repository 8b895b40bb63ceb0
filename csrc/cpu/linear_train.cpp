// linear_plain, linear_dgrad, linear_wgrad: a thread packs as many panels as its L2 holds, right
// before it multiplies every tile of rows with them, so a plain matrix is read from memory once and
// never written back in packed form.
#include "ops/linear_train.h"

#include "cpu/cpu.h"
#include "cpu/panel_pack.h"
#include "cpu/parallel.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

constexpr std::int64_t kPanel = contract::kPanel;
// Below this much work a second thread costs more than it saves.
constexpr std::int64_t kMinParallelMultiplies = 512 << 10;
// Token pairs packed together when tiles are cut out of rows: both sides stay in L1 and L2.
constexpr std::int64_t kStepRun = 8;

// Panels packed at a time.
std::int64_t panels_at_once(std::int64_t num_steps) {
  const std::int64_t bytes = num_steps * kPanel * static_cast<std::int64_t>(sizeof(KStep));
  return std::max<std::int64_t>(1, kReuseBytes / std::max<std::int64_t>(1, bytes));
}
KStep* panel_scratch(std::int64_t num_panels, std::int64_t num_steps) {
  return static_cast<KStep*>(scratch(
      Scratch::kThread, static_cast<std::size_t>(num_panels * num_steps * kPanel) * sizeof(KStep)));
}

// Rows of fp32 or of bf16: which of them is a matter of the run, not of one more build of the
// tiles.
struct OutRows {
  void* data;
  std::int64_t row_stride;
  DType dtype;

  OutRows from(std::int64_t row) const {
    const std::int64_t offset = row * row_stride * static_cast<std::int64_t>(size_of(dtype));
    return {static_cast<char*>(data) + offset, row_stride, dtype};
  }
  TML_INLINE void store(std::int64_t row, std::int64_t n, std::int64_t end, Vec acc) const {
    if (dtype == DType::kF32)
      store_to(static_cast<float*>(data) + row * row_stride, n, end, acc);
    else
      store_to(static_cast<std::uint16_t*>(data) + row * row_stride, n, end, acc);
  }

 private:
  template <class Y>
  static TML_INLINE void store_to(Y* row, std::int64_t n, std::int64_t end, Vec acc) {
    if (n + 16 <= end)
      store_rounded(row + n, acc);
    else if (n < end)
      store_first_rounded(row + n, acc, static_cast<int>(end - n));
  }
};

// What makes panels: make(context, first panel, count, out).
struct Packer {
  const void* context;
  void (*make)(const void* context, std::int64_t first, std::int64_t count, KStep* out);
};
template <class Make>
Packer packer(const Make& make) {
  return {&make, [](const void* context, std::int64_t first, std::int64_t count, KStep* out) {
            (*static_cast<const Make*>(context))(first, count, out);
          }};
}

// y[t, n] over rows of x and `num_outputs` outputs, times the panels that `pack` makes.
template <class T>
void multiply_rows(const T* x, std::int64_t x_row_stride, std::int64_t num_rows, std::int64_t depth,
                   const OutRows& y, std::int64_t num_outputs, int num_threads,
                   const Packer& pack) {
  const std::int64_t num_steps = ceil_div(depth, 4 / static_cast<std::int64_t>(sizeof(T)));
  const std::int64_t num_panels = ceil_div(num_outputs, kPanel);
  const TileSplit tiles(num_rows);
  auto* packed = static_cast<KStep*>(
      scratch(Scratch::kOp, static_cast<std::size_t>(num_rows * num_steps) * sizeof(KStep)));
  const bool small = num_rows * depth * num_outputs < kMinParallelMultiplies;
  parallel(small ? 1 : num_threads, [&](int thread, int team) {
    const Range own_tiles = split(tiles.count, thread, team);
    for (std::int64_t tile = own_tiles.begin; tile < own_tiles.end; ++tile)
      pack_rows<T>(packed + tiles.begin(tile) * num_steps, tiles.rows(tile), depth,
                   [&](int m) { return x + (tiles.begin(tile) + m) * x_row_stride; });
    team_barrier();
    const Range panels = split(num_panels, thread, team);
    const std::int64_t run = std::min(panels_at_once(num_steps), panels.end - panels.begin);
    KStep* fresh = panel_scratch(run, num_steps);
    for (std::int64_t first = panels.begin; first < panels.end; first += run) {
      const std::int64_t count = std::min(run, panels.end - first);
      pack.make(pack.context, first, count, fresh);
      multiply_tiles<sizeof(T) == 2>(fresh, num_steps, 0, count, packed, num_rows,
                                     [&](std::int64_t t, std::int64_t panel, int vec, Vec acc) {
                                       y.store(t, (first + panel) * kPanel + vec * 16, num_outputs,
                                               acc);
                                     });
    }
  });
}

template <class T>
void plain_typed(const LinearPlainParams& p) {
  const auto* w = static_cast<const T*>(p.w);
  const std::int64_t panel_steps = num_k_steps(p.dtype, p.in_dim) * kPanel;
  const auto pack = [&](std::int64_t first, std::int64_t count, KStep* out) {
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t n = (first + i) * kPanel;
      pack_panel_of_rows(w + n * p.w_row_stride, p.w_row_stride,
                         static_cast<int>(std::min(kPanel, p.out_dim - n)), p.in_dim,
                         out + i * panel_steps);
    }
  };
  multiply_rows(static_cast<const T*>(p.x), p.x_row_stride, p.num_tokens, p.in_dim,
                {p.y, p.y_row_stride, p.y_dtype}, p.out_dim, p.num_threads, packer(pack));
}

template <class T>
void dgrad_typed(const LinearDgradParams& p) {
  const auto* w = static_cast<const T*>(p.w);
  const auto pack = [&](std::int64_t first, std::int64_t count, KStep* out) {
    pack_panels_of_columns(w + first * kPanel, p.w_row_stride, p.out_dim, p.in_dim - first * kPanel,
                           count, out);
  };
  multiply_rows(static_cast<const T*>(p.dy), p.dy_row_stride, p.num_tokens, p.out_dim,
                {p.dx, p.dx_row_stride, p.dx_dtype}, p.in_dim, p.num_threads, packer(pack));
}

// kRows outputs n of one tile times one panel of k, block of tokens by block.
template <bool kBf16, int kRows>
void wgrad_tile(const KStep* panel, const KStep* tile, std::int64_t num_steps, const OutRows& dw,
                std::int64_t k, std::int64_t in_dim) {
  constexpr std::int64_t kBlockSteps = contract::kGradBlock / (kBf16 ? 2 : 1);
  Vec total[kRows][2];
  for (auto& row : total) row[0] = row[1] = zero();
  for (std::int64_t step = 0; step < num_steps; step += kBlockSteps) {
    const KStep* const w[2] = {panel + step * kPanel, panel + step * kPanel + 16};
    Vec acc[kRows][2];
    for (auto& row : acc) row[0] = row[1] = zero();
    panel_tile<kBf16, kRows, 2, 0>(w, kPanel, tile + step * kRows, kRows,
                                   std::min(kBlockSteps, num_steps - step), acc);
    for (int m = 0; m < kRows; ++m)
      for (int v = 0; v < 2; ++v) total[m][v] = add(total[m][v], acc[m][v]);
  }
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < 2; ++v) dw.store(m, k + v * 16, in_dim, total[m][v]);
}

template <class T>
void wgrad_typed(const LinearWgradParams& p) {
  constexpr bool kBf16 = sizeof(T) == 2;
  const std::int64_t num_steps = num_k_steps(p.dtype, p.num_tokens);
  const std::int64_t panel_steps = num_steps * kPanel;
  const std::int64_t num_panels = ceil_div(p.in_dim, kPanel);
  const TileSplit tiles(p.out_dim);
  const auto* dy = static_cast<const T*>(p.dy);
  const auto* x = static_cast<const T*>(p.x);
  auto* packed = static_cast<KStep*>(
      scratch(Scratch::kOp, static_cast<std::size_t>(p.out_dim * num_steps) * sizeof(KStep)));
  const bool small = p.num_tokens * p.in_dim * p.out_dim < kMinParallelMultiplies;
  parallel(small ? 1 : p.num_threads, [&](int thread, int team) {
    const Range runs = split(ceil_div(num_steps, kStepRun), thread, team);
    for (std::int64_t run = runs.begin; run < runs.end; ++run) {
      const std::int64_t end = std::min((run + 1) * kStepRun, num_steps);
      for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
        const std::int64_t first = tiles.begin(tile);
        const int rows = tiles.rows(tile);
        for (std::int64_t step = run * kStepRun; step < end; ++step)
          column_steps(dy + first, p.dy_row_stride, p.num_tokens, step, rows, rows,
                       packed + first * num_steps + step * rows);
      }
    }
    team_barrier();
    // A thread makes its own panels; with few of them the tiles are shared out instead.
    const bool by_panels = num_panels % team == 0 || num_panels >= 8 * team;
    const Range panels = by_panels ? split(num_panels, thread, team) : Range{0, num_panels};
    const Range own_tiles = by_panels ? Range{0, tiles.count} : split(tiles.count, thread, team);
    const std::int64_t at_once = std::min(panels_at_once(num_steps), panels.end - panels.begin);
    KStep* fresh = panel_scratch(at_once, num_steps);
    for (std::int64_t chunk = panels.begin; chunk < panels.end; chunk += at_once) {
      const std::int64_t count = std::min(at_once, panels.end - chunk);
      pack_panels_of_columns(x + chunk * kPanel, p.x_row_stride, p.num_tokens,
                             p.in_dim - chunk * kPanel, count, fresh);
      for (std::int64_t tile = own_tiles.begin; tile < own_tiles.end; ++tile)
        for (std::int64_t i = 0; i < count; ++i) {
          const std::int64_t first = tiles.begin(tile);
          const OutRows dw = OutRows{p.dw, p.dw_row_stride, p.dw_dtype}.from(first);
          with_rows(tiles.rows(tile), [&](auto rows) TML_LAMBDA {
            wgrad_tile<kBf16, decltype(rows)::value>(fresh + i * panel_steps,
                                                     packed + first * num_steps, num_steps, dw,
                                                     (chunk + i) * kPanel, p.in_dim);
          });
        }
    }
  });
}

}  // namespace

void linear_plain(const LinearPlainParams& p) {
  if (p.num_tokens == 0 || p.out_dim == 0) return;
  if (p.dtype == DType::kF32) return TML_F32(linear_plain, plain_typed<float>)(p);
  plain_typed<std::uint16_t>(p);
}

void linear_dgrad(const LinearDgradParams& p) {
  if (p.num_tokens == 0 || p.in_dim == 0) return;
  if (p.dtype == DType::kF32) return TML_F32(linear_dgrad, dgrad_typed<float>)(p);
  dgrad_typed<std::uint16_t>(p);
}

void linear_wgrad(const LinearWgradParams& p) {
  if (p.in_dim == 0 || p.out_dim == 0) return;
  if (p.dtype == DType::kF32) return TML_F32(linear_wgrad, wgrad_typed<float>)(p);
  wgrad_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
