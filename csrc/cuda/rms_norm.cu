// rms_norm: a block owns a row; the second pass over it comes from L1 or L2.
#include "cuda/cuda.h"
#include "cuda/row.h"

namespace tml::cuda {
namespace {

struct RowParams {
  RmsNormParams op;
  bool is_aligned;
};

template <class T>
TML_KERNEL(kRowThreads, 4)
rms_norm_kernel(const TML_GRID_CONSTANT RowParams p) {
  grid_launch_dependents();
  grid_wait();
  const RmsNormParams& op = p.op;
  const std::int64_t row = blockIdx.x;
  rms_norm_row<T>(static_cast<const T*>(op.x) + row * op.x_row_stride,
                  static_cast<const T*>(op.weight), static_cast<T*>(op.y) + row * op.y_row_stride,
                  op.dim, op.eps, p.is_aligned, reinterpret_cast<float*>(shared_memory()),
                  [&](float v) {
                    if (op.divisor != 1.0f) v = round_as<T>(__fdiv_rn(v, op.divisor));
                    return op.use_gelu ? round_as<T>(gelu(v)) : v;
                  });
}

template <class T>
void rms_norm_typed(const RmsNormParams& p, const Launch& launch) {
  const bool is_aligned = is_row_aligned(static_cast<const T*>(p.x), p.x_row_stride) &&
                          is_row_aligned(static_cast<const T*>(p.y), p.y_row_stride) &&
                          is_row_aligned(static_cast<const T*>(p.weight), 16);
  launch_kernel("rms_norm", launch, rms_norm_kernel<T>, static_cast<unsigned>(p.num_rows),
                kRowThreads, kRowSharedBytes, RowParams{p, is_aligned});
}

}  // namespace

void rms_norm(const RmsNormParams& p, const Launch& launch) {
  if (p.num_rows == 0 || p.dim == 0) return;
  if (p.dtype == DType::kF32) return rms_norm_typed<float>(p, launch);
  rms_norm_typed<std::uint16_t>(p, launch);
}

}  // namespace tml::cuda
