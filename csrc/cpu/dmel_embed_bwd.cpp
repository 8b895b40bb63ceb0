// dmel_embed_bwd: a thread first recomputes the sums of its frames and their gradients in fp32;
// then it owns channels, whose few levels are summed in L1 while the frames pass, some columns at a
// time.
#include "cpu/arena.h"
#include "cpu/cpu.h"
#include "cpu/norm_bwd.h"
#include "ops/embed_bwd.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

// Below this many additions a second thread costs more than it saves.
constexpr std::int64_t kMinParallelAdds = 256 << 10;
// Columns of a channel's levels summed together.
constexpr std::int64_t kRunColumns = 128;

// The forward's sum of one frame, in the table's type.
template <class T>
void sum_frame(const DmelEmbedBwdParams& p, std::int64_t frame, T* out) {
  const std::int32_t* bins = p.bins + frame * p.num_channels;
  for (std::int64_t group = 0; group * 16 < p.dim; ++group) {
    const int count = group_width(group, p.dim);
    Vec sum = zero();
    for (std::int64_t c = 0; c < p.num_channels; ++c)
      sum = add(sum, load_part(static_cast<const T*>(p.table) +
                                   (c * p.num_levels + bins[c]) * p.table_row_stride + group * 16,
                               count));
    store_part(out + group * 16, sum, count);
  }
}

// One channel, columns [begin, begin + width): totals and blocks are [num_levels, kRunColumns].
template <class T>
void sum_levels(const DmelEmbedBwdParams& p, const float* dsum, std::int64_t channel,
                std::int64_t begin, std::int64_t width, float* totals, float* blocks,
                std::int64_t* block_of) {
  const std::int64_t num_groups = ceil_div(width, 16);
  const auto row_bytes = static_cast<std::size_t>(kRunColumns) * sizeof(float);
  std::memset(totals, 0, static_cast<std::size_t>(p.num_levels) * row_bytes);
  for (std::int64_t level = 0; level < p.num_levels; ++level) block_of[level] = -1;
  const auto promote = [&](std::int64_t level) {
    for (std::int64_t i = 0; i < num_groups * 16; i += 16) {
      float* total = totals + level * kRunColumns + i;
      store(total, add(load(total), load(blocks + level * kRunColumns + i)));
    }
  };
  for (std::int64_t frame = 0; frame < p.num_frames; ++frame) {
    const std::int64_t level = p.bins[frame * p.num_channels + channel];
    const std::int64_t block = frame / contract::kGradBlock;
    if (block_of[level] != block) {
      if (block_of[level] >= 0) promote(level);
      block_of[level] = block;
      std::memset(blocks + level * kRunColumns, 0, row_bytes);
    }
    for (std::int64_t group = 0; group < num_groups; ++group) {
      float* sum = blocks + level * kRunColumns + group * 16;
      store(sum, add(load(sum), load_part(dsum + frame * p.dim + begin + group * 16,
                                          group_width(group, width))));
    }
  }
  for (std::int64_t level = 0; level < p.num_levels; ++level) {
    if (block_of[level] < 0) continue;
    promote(level);
    T* out = static_cast<T*>(p.dtable) + (channel * p.num_levels + level) * p.dim + begin;
    for (std::int64_t group = 0; group < num_groups; ++group)
      store_part(out + group * 16, load(totals + level * kRunColumns + group * 16),
                 group_width(group, width));
  }
}

template <class T>
void dmel_embed_bwd_typed(const DmelEmbedBwdParams& p) {
  const auto* dy = static_cast<const T*>(p.dy);
  const auto* weight = static_cast<const T*>(p.weight);
  T* sums;
  float *dsum, *rstd;
  Arena arena(Scratch::kOp);
  arena.take(&sums, p.num_frames * p.dim)
      .take(&dsum, p.num_frames * p.dim)
      .take(&rstd, p.num_frames)
      .commit();
  const bool is_small = p.num_frames * p.num_channels * p.dim < kMinParallelAdds;
  parallel(is_small ? 1 : p.num_threads, [&](int thread, int num_threads) {
    const Range frames = split(p.num_frames, thread, num_threads);
    for (std::int64_t f = frames.begin; f < frames.end; ++f) {
      T* sum = sums + f * p.dim;
      sum_frame(p, f, sum);
      const auto upstream = [&](std::int64_t i, int count, Vec, Vec) {
        return load_part(dy + f * p.dy_row_stride + i, count);
      };
      const NormRow stats = norm_row(sum, weight, p.dim, p.eps, upstream);
      rstd[f] = stats.rstd;
      norm_row_dx(sum, weight, p.dim, stats, upstream, [&](std::int64_t i, int count, Vec value) {
        store_part(dsum + f * p.dim + i, value, count);
      });
    }
    team_barrier();
    grad_columns<1>(
        split(ceil_div(p.dim, 16), thread, num_threads), p.num_frames,
        [&](std::int64_t f, std::int64_t group, Vec(&sum)[1]) {
          const int count = group_width(group, p.dim);
          const Vec e = load_part(dy + f * p.dy_row_stride + group * 16, count);
          const Vec x = load_part(sums + f * p.dim + group * 16, count);
          sum[0] = fma(e, normed_part<T>(x, rstd[f]), sum[0]);
        },
        [&](std::int64_t group, const Vec(&total)[1]) {
          store_part(static_cast<T*>(p.dweight) + group * 16, total[0], group_width(group, p.dim));
        });
    float *totals, *blocks;
    std::int64_t* block_of;
    Arena own(Scratch::kThread);
    own.take(&totals, p.num_levels * kRunColumns)
        .take(&blocks, p.num_levels * kRunColumns)
        .take(&block_of, p.num_levels)
        .commit();
    const Range channels = split(p.num_channels, thread, num_threads);
    for (std::int64_t begin = 0; begin < p.dim; begin += kRunColumns)
      for (std::int64_t channel = channels.begin; channel < channels.end; ++channel)
        sum_levels<T>(p, dsum, channel, begin, std::min(kRunColumns, p.dim - begin), totals, blocks,
                      block_of);
  });
}

}  // namespace

void dmel_embed_bwd(const DmelEmbedBwdParams& p) {
  if (p.dim == 0) return;
  if (p.dtype == DType::kF32) return TML_F32(dmel_embed_bwd, dmel_embed_bwd_typed<float>)(p);
  dmel_embed_bwd_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
