// sconv_norm_bwd: sixteen threads to a token for dresidual, the gradient that enters the
// convolution; then a block to a token for dx, and a column to a thread for the parameters.
#include "cuda/conv_bwd.h"
#include "cuda/cuda.h"

namespace tml::cuda {
namespace {

struct Work {
  float* rstd;       // [num_tokens]
  Neighbours* near;  // [num_tokens]
  float* taps;       // [blocks, dim, 4]
  float* norm;       // [blocks, dim]
  std::size_t num_bytes;

  Work(const SconvNormBwdParams& p, void* base) {
    Workspace parts(base);
    rstd = parts.take<float>(p.num_tokens);
    near = parts.take<Neighbours>(p.num_tokens);
    taps = parts.take<float>(grad_blocks(p.num_tokens) * p.dim * contract::kConvTaps);
    norm = parts.take<float>(p.norm_weight == nullptr ? 0 : grad_blocks(p.num_tokens) * p.dim);
    num_bytes = parts.used();
  }
};

struct GradParams {
  SconvNormBwdParams op;
  float* rstd;
  Neighbours* near;
  float* taps;
  float* norm;
};

template <class T>
TML_KERNEL(kRowThreads, 4)
sconv_dresidual_kernel(const TML_GRID_CONSTANT GradParams p) {
  grid_launch_dependents();
  grid_wait();
  const SconvNormBwdParams& op = p.op;
  const bool is_row = own_row() < op.num_tokens;
  const std::int64_t token = is_row ? own_row() : op.num_tokens - 1;
  if (is_row && lane_of_row() == 0) p.near[token] = neighbours_of(op.cu_tokens, op.num_seqs, token);
  const T* const direct = static_cast<const T*>(op.dsum) + token * op.dsum_row_stride;
  T* const out = static_cast<T*>(op.dresidual) + token * op.dim;
  if (op.norm_weight == nullptr) {
    if (is_row)
      for (std::int64_t i = lane_of_row(); i < op.dim; i += contract::kLanes) out[i] = direct[i];
    return;
  }
  const T* const sum = static_cast<const T*>(op.sum) + token * op.sum_row_stride;
  const T* const weight = static_cast<const T*>(op.norm_weight);
  const T* const dnormed = static_cast<const T*>(op.dnormed) + token * op.dnormed_row_stride;
  const auto upstream = [&](std::int64_t i, float, float) { return as_float(dnormed[i]); };
  const NormRow stats = norm_row(sum, weight, op.dim, op.eps, upstream);
  if (!is_row) return;
  if (lane_of_row() == 0) p.rstd[token] = stats.rstd;
  norm_row_dx(sum, weight, op.dim, stats, upstream, [&](std::int64_t i, float value) {
    put(out + i, __fadd_rn(as_float(direct[i]), value));
  });
}

template <class T>
TML_KERNEL(kRowThreads, 4)
sconv_dx_kernel(const TML_GRID_CONSTANT GradParams p) {
  grid_launch_dependents();
  grid_wait();
  const SconvNormBwdParams& op = p.op;
  const std::int64_t token = blockIdx.x;
  const Neighbours near = p.near[token];
  const T* const g = static_cast<const T*>(op.dresidual) + token * op.dim;
  T* const dx = static_cast<T*>(op.dx) + token * op.dim;
  for (std::int64_t i = threadIdx.x; i < op.dim; i += kRowThreads)
    put(dx + i, conv_dx(op.conv_weight + i * contract::kConvTaps, g + i, op.dim, near));
}

template <class T>
TML_KERNEL(kRowThreads, 4)
sconv_parameters_kernel(const TML_GRID_CONSTANT GradParams p) {
  grid_launch_dependents();
  grid_wait();
  const SconvNormBwdParams& op = p.op;
  grad_columns(op.num_tokens, op.dim,
               [&](std::int64_t block, std::int64_t column, std::int64_t begin, std::int64_t end) {
                 const T* const g = static_cast<const T*>(op.dresidual) + column;
                 const T* const x = static_cast<const T*>(op.x) + column;
                 float taps[contract::kConvTaps] = {};
#pragma unroll 4
                 for (std::int64_t t = begin; t < end; ++t)
                   add_taps(taps, as_float(g[t * op.dim]), x + t * op.x_row_stride, op.x_row_stride,
                            p.near[t]);
                 float* const out = p.taps + (block * op.dim + column) * contract::kConvTaps;
#pragma unroll
                 for (int tap = 0; tap < contract::kConvTaps; ++tap) out[tap] = taps[tap];
                 if (op.norm_weight == nullptr) return;
                 const T* const dnormed = static_cast<const T*>(op.dnormed) + column;
                 const T* const rows = static_cast<const T*>(op.sum) + column;
                 float sum = 0.0f;
#pragma unroll 8
                 for (std::int64_t t = begin; t < end; ++t)
                   sum = __fmaf_rn(
                       as_float(dnormed[t * op.dnormed_row_stride]),
                       normed_value<T>(as_float(rows[t * op.sum_row_stride]), p.rstd[t]), sum);
                 p.norm[block * op.dim + column] = sum;
               });
}

template <class T>
void sconv_norm_bwd_typed(const GradParams& p, const Launch& launch) {
  const SconvNormBwdParams& op = p.op;
  launch_kernel("sconv_norm_bwd", launch, sconv_dresidual_kernel<T>,
                blocks_for(op.num_tokens, kGradRows), kRowThreads, 0, p);
  launch_kernel("sconv_norm_bwd", launch, sconv_dx_kernel<T>, static_cast<unsigned>(op.num_tokens),
                kRowThreads, 0, p);
  launch_kernel("sconv_norm_bwd", launch, sconv_parameters_kernel<T>,
                grad_columns_grid(op.num_tokens, op.dim), kRowThreads, 0, p);
}

}  // namespace

std::size_t sconv_norm_bwd_workspace_bytes(const SconvNormBwdParams& p) {
  return Work(p, nullptr).num_bytes;
}

void sconv_norm_bwd(const SconvNormBwdParams& p, const Launch& launch) {
  if (p.dim == 0) return;
  const Work work(p, launch.workspace);
  check_workspace("sconv_norm_bwd", launch, work.num_bytes);
  const GradParams params{p, work.rstd, work.near, work.taps, work.norm};
  if (p.num_tokens > 0) {
    if (p.dtype == DType::kF32)
      sconv_norm_bwd_typed<float>(params, launch);
    else
      sconv_norm_bwd_typed<std::uint16_t>(params, launch);
  }
  const std::int64_t blocks = grad_blocks(p.num_tokens);
  fold_blocks("sconv_norm_bwd", launch, work.taps, blocks, p.dim * contract::kConvTaps, p.dconv,
              DType::kF32);
  if (p.norm_weight != nullptr)
    fold_blocks("sconv_norm_bwd", launch, work.norm, blocks, p.dim, p.dnorm, p.dtype);
}

}  // namespace tml::cuda
