// sconv_norm: a block owns a token (the first three of a sequence together, cuda/step.h): the four
// inputs of a channel come from L2 or the state, the new residual is written once, and the norm
// reads it back from L1.
#include "cuda/cuda.h"
#include "cuda/step.h"

namespace tml::cuda {
namespace {

struct SconvParams {
  SconvNormParams op;
  bool is_aligned;
};

template <class T>
TML_KERNEL(kRowThreads, 3)
sconv_norm_kernel(const TML_GRID_CONSTANT SconvParams p) {
  grid_launch_dependents();
  grid_wait();
  const SconvNormParams& op = p.op;
  const StepShare share = share_of(op.batch, blockIdx.x);
  const std::int64_t first = op.batch.cu_tokens[share.seq];
  const ConvInput<T> input{
      static_cast<const T*>(op.x) + first * op.x_row_stride, op.x_row_stride,
      static_cast<T*>(op.conv.rows) + op.batch.slots[share.seq] * op.conv.slot_stride,
      op.conv.row_stride};
  auto* const shared = reinterpret_cast<float*>(shared_memory());
  for (std::int64_t t = share.offset; t < share.offset + share.count; ++t) {
    T* const residual = static_cast<T*>(op.residual) + (first + t) * op.residual_row_stride;
    each_group(op.dim, [&](std::int64_t i, std::int64_t count) {
      float x[4][8], sum[8];
#pragma unroll
      for (int tap = 0; tap < 4; ++tap)
        load_eight(x[tap], input.row(t - kHistory + tap) + i, count, p.is_aligned);
      load_eight(sum, residual + i, count, p.is_aligned);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j >= count) break;
        const float4 w = *reinterpret_cast<const float4*>(op.conv_weight + (i + j) * 4);
        const float taps[4] = {w.x, w.y, w.z, w.w};
        sum[j] = __fadd_rn(sum[j], convolved<T>(taps, x[0][j], x[1][j], x[2][j], x[3][j]));
      }
      store_eight(residual + i, sum, count, p.is_aligned);
    });
    if (op.norm_weight != nullptr) {
      rms_norm_row<T>(residual, static_cast<const T*>(op.norm_weight),
                      static_cast<T*>(op.normed) + (first + t) * op.normed_row_stride, op.dim,
                      op.eps, p.is_aligned, shared, [](float v) { return v; });
      __syncthreads();  // the next token's sum uses the same shared memory
    }
  }
  if (share.offset == 0)
    each_group(op.dim, [&](std::int64_t i, std::int64_t count) {
      advance_state(input, i, count, share.seq_tokens, p.is_aligned);
    });
}

template <class T>
void sconv_norm_typed(const SconvNormParams& p, const Launch& launch) {
  const bool is_aligned =
      is_row_aligned(static_cast<const T*>(p.x), p.x_row_stride) &&
      is_row_aligned(static_cast<const T*>(p.residual), p.residual_row_stride) &&
      is_row_aligned(static_cast<const T*>(p.normed), p.normed_row_stride) &&
      is_row_aligned(static_cast<const T*>(p.norm_weight), 16) &&
      is_row_aligned(static_cast<const T*>(p.conv.rows), p.conv.row_stride) &&
      is_row_aligned(static_cast<const T*>(p.conv.rows), p.conv.slot_stride);
  launch_kernel("sconv_norm", launch, sconv_norm_kernel<T>,
                static_cast<unsigned>(p.batch.num_tokens), kRowThreads, kRowSharedBytes,
                SconvParams{p, is_aligned});
}

}  // namespace

void sconv_norm(const SconvNormParams& p, const Launch& launch) {
  if (p.batch.num_tokens == 0 || p.dim == 0) return;
  if (p.dtype == DType::kF32) return sconv_norm_typed<float>(p, launch);
  sconv_norm_typed<std::uint16_t>(p, launch);
}

}  // namespace tml::cuda
