// dmel_embed: units of one frame times kBlock columns, whose sums stay in registers while the
// channels' rows pass; then each frame's row is normalised in place. Few frames still feed many
// threads, because a unit is less than a row.
#include "ops/dmel_embed.h"

#include "cpu/cpu.h"
#include "cpu/parallel.h"
#include "cpu/row_norm.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

constexpr int kVecs = 8;
constexpr std::int64_t kBlock = kVecs * 16;
// Below this many additions a second thread costs more than it saves.
constexpr std::int64_t kMinParallelAdds = 512 << 10;

template <class T>
void sum_columns(const DmelEmbedParams& p, std::int64_t frame, std::int64_t begin) {
  const auto* table = static_cast<const T*>(p.table) + begin;
  const std::int32_t* bins = p.bins + frame * p.num_channels;
  T* y = static_cast<T*>(p.y) + frame * p.y_row_stride + begin;
  const std::int64_t width = p.dim - begin < kBlock ? p.dim - begin : kBlock;
  const auto row = [&](std::int64_t c) {
    return table + (c * p.num_levels + bins[c]) * p.table_row_stride;
  };
  if (width == kBlock) {
    Vec sum[kVecs];
    for (Vec& s : sum) s = zero();
    for (std::int64_t c = 0; c < p.num_channels; ++c)
      for (int v = 0; v < kVecs; ++v) sum[v] = add(sum[v], load_as_f32(row(c) + v * 16));
    for (int v = 0; v < kVecs; ++v) store_rounded(y + v * 16, sum[v]);
    return;
  }
  for (std::int64_t i = 0; i < width; i += 16) {
    const int count = width - i < 16 ? static_cast<int>(width - i) : 16;
    Vec sum = zero();
    for (std::int64_t c = 0; c < p.num_channels; ++c)
      sum = add(sum, load_first_as_f32(row(c) + i, count));
    store_first_rounded(y + i, sum, count);
  }
}

template <class T>
void dmel_embed_typed(const DmelEmbedParams& p) {
  const auto* weight = static_cast<const T*>(p.weight);
  const std::int64_t num_blocks = ceil_div(p.dim, kBlock);
  const bool is_small = p.num_frames * p.num_channels * p.dim < kMinParallelAdds;
  parallel(is_small ? 1 : p.num_threads, [&](int thread, int num_threads) {
    const Range units = split(p.num_frames * num_blocks, thread, num_threads);
    for (std::int64_t unit = units.begin; unit < units.end; ++unit)
      sum_columns<T>(p, unit / num_blocks, unit % num_blocks * kBlock);
    team_barrier();
    const Range frames = split(p.num_frames, thread, num_threads);
    for (std::int64_t frame = frames.begin; frame < frames.end; ++frame) {
      T* y = static_cast<T*>(p.y) + frame * p.y_row_stride;
      rms_norm_row(y, weight, y, p.dim, p.eps);
    }
  });
}

}  // namespace

void dmel_embed(const DmelEmbedParams& p) {
  if (p.num_frames == 0 || p.dim == 0) return;
  if (p.dtype == DType::kF32) return TML_F32(dmel_embed, dmel_embed_typed<float>)(p);
  dmel_embed_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
