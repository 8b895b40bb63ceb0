// rms_norm_bwd: sixteen threads to a row for dx, then a column to a thread for dweight, which reads
// x and dy once more and needs only each row's rstd.
#include "cuda/cuda.h"
#include "cuda/norm_bwd.h"

namespace tml::cuda {
namespace {

struct Work {
  float* rstd;     // [num_rows]
  float* partial;  // [blocks, dim]
  std::size_t num_bytes;

  Work(const RmsNormBwdParams& p, void* base) {
    Workspace parts(base);
    rstd = parts.take<float>(p.num_rows);
    partial = parts.take<float>(grad_blocks(p.num_rows) * p.dim);
    num_bytes = parts.used();
  }
};

struct GradParams {
  RmsNormBwdParams op;
  float* rstd;
  float* partial;
};

// d gelu(x) / dx = (1 + erf(x / sqrt 2)) / 2 + x e^(-x^2 / 2) / sqrt(2 pi)
TML_DEVICE float gelu_slope(float x) {
  const float cdf = __fmaf_rn(0.5f, erf_poly(__fmul_rn(x, 0.70710678118654752f)), 0.5f);
  const float density =
      __fmul_rn(exp_poly(__fmul_rn(__fmul_rn(x, x), -0.5f)), 0.39894228040143268f);
  return __fmaf_rn(x, density, cdf);
}

// The gradient of weight * normed from that of the op's output.
template <class T>
TML_DEVICE float upstream(const RmsNormBwdParams& op, T dy, float normed, float weight) {
  float e = as_float(dy);
  if (op.use_gelu) {
    float y = round_as<T>(__fmul_rn(weight, normed));
    if (op.divisor != 1.0f) y = round_as<T>(__fdiv_rn(y, op.divisor));
    e = __fmul_rn(e, gelu_slope(y));
  }
  return op.divisor != 1.0f ? __fdiv_rn(e, op.divisor) : e;
}

template <class T>
TML_KERNEL(kRowThreads, 4)
rms_norm_dx_kernel(const TML_GRID_CONSTANT GradParams p) {
  grid_launch_dependents();
  grid_wait();
  const RmsNormBwdParams& op = p.op;
  const bool is_row = own_row() < op.num_rows;
  const std::int64_t row = is_row ? own_row() : op.num_rows - 1;
  const T* const x = static_cast<const T*>(op.x) + row * op.x_row_stride;
  const T* const dy = static_cast<const T*>(op.dy) + row * op.dy_row_stride;
  const T* const weight = static_cast<const T*>(op.weight);
  T* const dx = static_cast<T*>(op.dx) + row * op.dx_row_stride;
  const auto of_row = [&](std::int64_t i, float normed, float w) {
    return upstream<T>(op, dy[i], normed, w);
  };
  const NormRow stats = norm_row(x, weight, op.dim, op.eps, of_row);
  if (!is_row) return;
  if (lane_of_row() == 0) p.rstd[row] = stats.rstd;
  norm_row_dx(x, weight, op.dim, stats, of_row,
              [&](std::int64_t i, float value) { put(dx + i, value); });
}

template <class T>
TML_KERNEL(kRowThreads, 4)
rms_norm_dweight_kernel(const TML_GRID_CONSTANT GradParams p) {
  grid_launch_dependents();
  grid_wait();
  const RmsNormBwdParams& op = p.op;
  grad_columns(
      op.num_rows, op.dim,
      [&](std::int64_t block, std::int64_t column, std::int64_t begin, std::int64_t end) {
        const T* const x = static_cast<const T*>(op.x) + column;
        const T* const dy = static_cast<const T*>(op.dy) + column;
        const float weight = as_float(static_cast<const T*>(op.weight)[column]);
        float sum = 0.0f;
#pragma unroll 8
        for (std::int64_t row = begin; row < end; ++row) {
          const float normed = normed_value<T>(as_float(x[row * op.x_row_stride]), p.rstd[row]);
          sum = __fmaf_rn(upstream<T>(op, dy[row * op.dy_row_stride], normed, weight), normed, sum);
        }
        p.partial[block * op.dim + column] = sum;
      });
}

template <class T>
void rms_norm_bwd_typed(const GradParams& p, const Launch& launch) {
  const RmsNormBwdParams& op = p.op;
  launch_kernel("rms_norm_bwd", launch, rms_norm_dx_kernel<T>, blocks_for(op.num_rows, kGradRows),
                kRowThreads, 0, p);
  launch_kernel("rms_norm_bwd", launch, rms_norm_dweight_kernel<T>,
                grad_columns_grid(op.num_rows, op.dim), kRowThreads, 0, p);
}

}  // namespace

std::size_t rms_norm_bwd_workspace_bytes(const RmsNormBwdParams& p) {
  return Work(p, nullptr).num_bytes;
}

void rms_norm_bwd(const RmsNormBwdParams& p, const Launch& launch) {
  if (p.dim == 0) return;
  const Work work(p, launch.workspace);
  check_workspace("rms_norm_bwd", launch, work.num_bytes);
  const GradParams params{p, work.rstd, work.partial};
  if (p.num_rows > 0) {
    if (p.dtype == DType::kF32)
      rms_norm_bwd_typed<float>(params, launch);
    else
      rms_norm_bwd_typed<std::uint16_t>(params, launch);
  }
  fold_blocks("rms_norm_bwd", launch, work.partial, grad_blocks(p.num_rows), p.dim, p.dweight,
              p.dtype);
}

}  // namespace tml::cuda
