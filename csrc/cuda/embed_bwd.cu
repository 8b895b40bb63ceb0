// embed_bwd, dmel_embed_bwd: what a token's norm gives back is made from two numbers a token. A row
// of the table belongs to the blocks of the first token that read it, which then walk the tokens of
// that id in ascending order: no sort, no atomics, nothing to wait for. A mel level's row belongs
// to a block that walks the frames with that level.
#include "cuda/cuda.h"
#include "cuda/norm_bwd.h"

namespace tml::cuda {
namespace {

constexpr int kWords = kRowThreads / 32;
constexpr int kOwnColumns = 4;  // of a thread, kRowThreads apart
constexpr std::int64_t kBlockColumns = kRowThreads * kOwnColumns;

struct EmbedWork {
  NormRow* stats;  // [num_tokens]
  float* partial;  // [blocks, dim]
  std::size_t num_bytes;

  EmbedWork(const EmbedBwdParams& p, void* base) {
    Workspace parts(base);
    stats = parts.take<NormRow>(p.num_tokens);
    partial = parts.take<float>(grad_blocks(p.num_tokens) * p.dim);
    num_bytes = parts.used();
  }
};
struct EmbedGrad {
  EmbedBwdParams op;
  NormRow* stats;
  float* partial;
};

template <class T>
TML_DEVICE const T* embed_row(const EmbedBwdParams& op, std::int64_t token) {
  return static_cast<const T*>(op.table) + op.ids[token] * op.table_row_stride;
}

template <class T>
TML_KERNEL(kRowThreads, 4)
embed_stats_kernel(const TML_GRID_CONSTANT EmbedGrad p) {
  grid_launch_dependents();
  grid_wait();
  const EmbedBwdParams& op = p.op;
  const bool is_row = own_row() < op.num_tokens;
  const std::int64_t token = is_row ? own_row() : op.num_tokens - 1;
  const T* const dy = static_cast<const T*>(op.dy) + token * op.dy_row_stride;
  const NormRow stats =
      norm_row(embed_row<T>(op, token), static_cast<const T*>(op.weight), op.dim, op.eps,
               [&](std::int64_t i, float, float) { return as_float(dy[i]); });
  if (is_row && lane_of_row() == 0) p.stats[token] = stats;
}

template <class T>
TML_KERNEL(kRowThreads, 4)
embed_dweight_kernel(const TML_GRID_CONSTANT EmbedGrad p) {
  grid_launch_dependents();
  grid_wait();
  const EmbedBwdParams& op = p.op;
  grad_columns(op.num_tokens, op.dim,
               [&](std::int64_t block, std::int64_t column, std::int64_t begin, std::int64_t end) {
                 const T* const dy = static_cast<const T*>(op.dy) + column;
                 float sum = 0.0f;
#pragma unroll 8
                 for (std::int64_t t = begin; t < end; ++t)
                   sum = __fmaf_rn(
                       as_float(dy[t * op.dy_row_stride]),
                       normed_value<T>(as_float(embed_row<T>(op, t)[column]), p.stats[t].rstd),
                       sum);
                 p.partial[block * op.dim + column] = sum;
               });
}

template <class T>
TML_KERNEL(kRowThreads, 4)
embed_dtable_kernel(const TML_GRID_CONSTANT EmbedGrad p) {
  grid_launch_dependents();
  grid_wait();
  const EmbedBwdParams& op = p.op;
  auto* const words = reinterpret_cast<unsigned*>(shared_memory());
  const std::int64_t chunks = (op.dim + kBlockColumns - 1) / kBlockColumns;
  const std::int64_t own = blockIdx.x / chunks, id = op.ids[own];
  for (std::int64_t first = 0; first < own; first += kRowThreads) {
    const std::int64_t token = first + threadIdx.x;
    const unsigned word = __ballot_sync(kFullMask, token < own && op.ids[token] == id);
    if (threadIdx.x % 32 == 0) words[threadIdx.x / 32] = word;
    __syncthreads();
    unsigned any = 0;
    for (int w = 0; w < kWords; ++w) any |= words[w];
    __syncthreads();
    if (any != 0) return;  // an earlier token's blocks own the row
  }
  const std::int64_t column = blockIdx.x % chunks * kBlockColumns + threadIdx.x;
  const T* const table = static_cast<const T*>(op.table) + id * op.table_row_stride;
  const T* const dy = static_cast<const T*>(op.dy);
  float x[kOwnColumns] = {}, weight[kOwnColumns] = {}, sum[kOwnColumns] = {};
  float total[kOwnColumns] = {};
#pragma unroll
  for (int j = 0; j < kOwnColumns; ++j) {
    const std::int64_t c = column + j * kRowThreads;
    if (c >= op.dim) break;
    x[j] = as_float(table[c]);
    weight[j] = as_float(static_cast<const T*>(op.weight)[c]);
  }
  each_match(
      own, op.num_tokens, words, [&](std::int64_t t) { return op.ids[t] == id; },
      [&](std::int64_t t) {
        const NormRow stats = p.stats[t];
#pragma unroll
        for (int j = 0; j < kOwnColumns; ++j) {
          const std::int64_t c = column + j * kRowThreads;
          if (c >= op.dim) break;
          const float e = as_float(dy[t * op.dy_row_stride + c]);
          sum[j] = __fadd_rn(sum[j], norm_dx(x[j], weight[j], e, stats));
        }
      },
      [&] {
#pragma unroll
        for (int j = 0; j < kOwnColumns; ++j) {
          total[j] = __fadd_rn(total[j], sum[j]);
          sum[j] = 0.0f;
        }
      });
  T* const out = static_cast<T*>(op.dtable) + id * op.dim;
#pragma unroll
  for (int j = 0; j < kOwnColumns; ++j) {
    const std::int64_t c = column + j * kRowThreads;
    if (c < op.dim) put(out + c, total[j]);
  }
}

template <class T>
void embed_bwd_typed(const EmbedGrad& p, const Launch& launch) {
  const EmbedBwdParams& op = p.op;
  launch_kernel("embed_bwd", launch, embed_stats_kernel<T>, blocks_for(op.num_tokens, kGradRows),
                kRowThreads, 0, p);
  launch_kernel("embed_bwd", launch, embed_dweight_kernel<T>,
                grad_columns_grid(op.num_tokens, op.dim), kRowThreads, 0, p);
  launch_kernel("embed_bwd", launch, embed_dtable_kernel<T>,
                static_cast<unsigned>(op.num_tokens) * blocks_for(op.dim, kBlockColumns),
                kRowThreads, kWords * sizeof(unsigned), p);
}

struct DmelWork {
  void* sums;   // [num_frames, dim], of the op's type: the forward's sums
  float* dsum;  // [num_frames, dim]
  float* rstd;  // [num_frames]
  float* partial;
  std::size_t num_bytes;

  DmelWork(const DmelEmbedBwdParams& p, void* base) {
    Workspace parts(base);
    sums = parts.take<char>(p.num_frames * p.dim * static_cast<std::int64_t>(size_of(p.dtype)));
    dsum = parts.take<float>(p.num_frames * p.dim);
    rstd = parts.take<float>(p.num_frames);
    partial = parts.take<float>(grad_blocks(p.num_frames) * p.dim);
    num_bytes = parts.used();
  }
};
struct DmelGrad {
  DmelEmbedBwdParams op;
  void* sums;
  float* dsum;
  float* rstd;
  float* partial;
};

template <class T>
TML_KERNEL(kRowThreads, 4)
dmel_dsum_kernel(const TML_GRID_CONSTANT DmelGrad p) {
  grid_launch_dependents();
  grid_wait();
  const DmelEmbedBwdParams& op = p.op;
  const bool is_row = own_row() < op.num_frames;
  const std::int64_t frame = is_row ? own_row() : op.num_frames - 1;
  const std::int32_t* const bins = op.bins + frame * op.num_channels;
  const T* const table = static_cast<const T*>(op.table);
  T* const sums = static_cast<T*>(p.sums) + frame * op.dim;
  // A frame that does not exist writes what the last one's threads write: the same values.
  for (std::int64_t i = lane_of_row(); i < op.dim; i += contract::kLanes) {
    float sum = 0.0f;
#pragma unroll 8
    for (std::int64_t c = 0; c < op.num_channels; ++c)
      sum =
          __fadd_rn(sum, as_float(table[(c * op.num_levels + bins[c]) * op.table_row_stride + i]));
    put(sums + i, sum);
  }
  const T* const dy = static_cast<const T*>(op.dy) + frame * op.dy_row_stride;
  const T* const weight = static_cast<const T*>(op.weight);
  const auto upstream = [&](std::int64_t i, float, float) { return as_float(dy[i]); };
  const NormRow stats = norm_row<T>(sums, weight, op.dim, op.eps, upstream);
  if (!is_row) return;
  if (lane_of_row() == 0) p.rstd[frame] = stats.rstd;
  norm_row_dx<T>(sums, weight, op.dim, stats, upstream,
                 [&](std::int64_t i, float value) { p.dsum[frame * op.dim + i] = value; });
}

template <class T>
TML_KERNEL(kRowThreads, 4)
dmel_dweight_kernel(const TML_GRID_CONSTANT DmelGrad p) {
  grid_launch_dependents();
  grid_wait();
  const DmelEmbedBwdParams& op = p.op;
  grad_columns(op.num_frames, op.dim,
               [&](std::int64_t block, std::int64_t column, std::int64_t begin, std::int64_t end) {
                 const T* const sums = static_cast<const T*>(p.sums) + column;
                 const T* const dy = static_cast<const T*>(op.dy) + column;
                 float sum = 0.0f;
#pragma unroll 8
                 for (std::int64_t f = begin; f < end; ++f)
                   sum = __fmaf_rn(as_float(dy[f * op.dy_row_stride]),
                                   normed_value<T>(as_float(sums[f * op.dim]), p.rstd[f]), sum);
                 p.partial[block * op.dim + column] = sum;
               });
}

template <class T>
TML_KERNEL(kRowThreads, 4)
dmel_dtable_kernel(const TML_GRID_CONSTANT DmelGrad p) {
  grid_launch_dependents();
  grid_wait();
  const DmelEmbedBwdParams& op = p.op;
  auto* const words = reinterpret_cast<unsigned*>(shared_memory());
  const std::int64_t chunks = (op.dim + kBlockColumns - 1) / kBlockColumns;
  const std::int64_t row = blockIdx.x / chunks;
  const std::int64_t channel = row / op.num_levels, level = row % op.num_levels;
  const std::int64_t column = blockIdx.x % chunks * kBlockColumns + threadIdx.x;
  float sum[kOwnColumns] = {}, total[kOwnColumns] = {};
  bool is_read = false;
  each_match(
      0, op.num_frames, words,
      [&](std::int64_t f) { return op.bins[f * op.num_channels + channel] == level; },
      [&](std::int64_t f) {
        is_read = true;
#pragma unroll
        for (int j = 0; j < kOwnColumns; ++j) {
          const std::int64_t c = column + j * kRowThreads;
          if (c < op.dim) sum[j] = __fadd_rn(sum[j], p.dsum[f * op.dim + c]);
        }
      },
      [&] {
#pragma unroll
        for (int j = 0; j < kOwnColumns; ++j) {
          total[j] = __fadd_rn(total[j], sum[j]);
          sum[j] = 0.0f;
        }
      });
  if (!is_read) return;
  T* const out = static_cast<T*>(op.dtable) + row * op.dim;
#pragma unroll
  for (int j = 0; j < kOwnColumns; ++j) {
    const std::int64_t c = column + j * kRowThreads;
    if (c < op.dim) put(out + c, total[j]);
  }
}

template <class T>
void dmel_embed_bwd_typed(const DmelGrad& p, const Launch& launch) {
  const DmelEmbedBwdParams& op = p.op;
  launch_kernel("dmel_embed_bwd", launch, dmel_dsum_kernel<T>, blocks_for(op.num_frames, kGradRows),
                kRowThreads, 0, p);
  launch_kernel("dmel_embed_bwd", launch, dmel_dweight_kernel<T>,
                grad_columns_grid(op.num_frames, op.dim), kRowThreads, 0, p);
  const auto rows = static_cast<unsigned>(op.num_channels * op.num_levels);
  if (rows > 0)
    launch_kernel("dmel_embed_bwd", launch, dmel_dtable_kernel<T>,
                  rows * blocks_for(op.dim, kBlockColumns), kRowThreads, kWords * sizeof(unsigned),
                  p);
}

}  // namespace

std::size_t embed_bwd_workspace_bytes(const EmbedBwdParams& p) {
  return EmbedWork(p, nullptr).num_bytes;
}

void embed_bwd(const EmbedBwdParams& p, const Launch& launch) {
  if (p.dim == 0) return;
  const EmbedWork work(p, launch.workspace);
  check_workspace("embed_bwd", launch, work.num_bytes);
  const EmbedGrad params{p, work.stats, work.partial};
  if (p.num_tokens > 0) {
    if (p.dtype == DType::kF32)
      embed_bwd_typed<float>(params, launch);
    else
      embed_bwd_typed<std::uint16_t>(params, launch);
  }
  fold_blocks("embed_bwd", launch, work.partial, grad_blocks(p.num_tokens), p.dim, p.dweight,
              p.dtype);
}

std::size_t dmel_embed_bwd_workspace_bytes(const DmelEmbedBwdParams& p) {
  return DmelWork(p, nullptr).num_bytes;
}

void dmel_embed_bwd(const DmelEmbedBwdParams& p, const Launch& launch) {
  if (p.dim == 0) return;
  const DmelWork work(p, launch.workspace);
  check_workspace("dmel_embed_bwd", launch, work.num_bytes);
  const DmelGrad params{p, work.sums, work.dsum, work.rstd, work.partial};
  if (p.num_frames > 0) {
    if (p.dtype == DType::kF32)
      dmel_embed_bwd_typed<float>(params, launch);
    else
      dmel_embed_bwd_typed<std::uint16_t>(params, launch);
  }
  fold_blocks("dmel_embed_bwd", launch, work.partial, grad_blocks(p.num_frames), p.dim, p.dweight,
              p.dtype);
}

}  // namespace tml::cuda
