// hmlp_fold: a thread owns eight columns of a row, one store of sixteen bytes; reads of neighbours
// lie in runs of side_fold * channels elements. A patch is read once: nothing to keep.
#include "cuda/cuda.h"
#include "cuda/row.h"

namespace tml::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
TML_KERNEL(kThreads, 4)
hmlp_fold_kernel(const TML_GRID_CONSTANT HmlpFoldParams p) {
  grid_launch_dependents();
  grid_wait();
  const std::int64_t frames = p.frames / p.frame_fold, side = p.side / p.side_fold;
  const std::int64_t groups = p.y_row_stride / 8;
  const std::int64_t width =
      static_cast<std::int64_t>(p.frame_fold) * p.side_fold * p.side_fold * p.channels;
  const std::int64_t count = p.num_patches * frames * side * side * groups;
  const auto* const x = static_cast<const T*>(p.x);
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    const std::int64_t row = i / groups, first = i % groups * 8;
    const std::int64_t w = row % side, h = row / side % side;
    const std::int64_t t = row / (side * side) % frames, patch = row / (side * side * frames);
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const std::int64_t column = first + j;
      const std::int64_t c = column % p.channels, cell = column / p.channels;
      const std::int64_t x_side = w * p.side_fold + cell % p.side_fold;
      const std::int64_t y_side = h * p.side_fold + cell / p.side_fold % p.side_fold;
      const std::int64_t frame = t * p.frame_fold + cell / (p.side_fold * p.side_fold);
      const std::int64_t at =
          (((patch * p.frames + frame) * p.side + y_side) * p.side + x_side) * p.channels + c;
      v[j] = column < width ? as_float(x[at]) : 0.0f;
    }
    store_eight(static_cast<std::uint16_t*>(p.y) + row * p.y_row_stride + first, v, 8, true);
  }
}

template <class T>
void hmlp_fold_typed(const HmlpFoldParams& p, std::int64_t groups, const Launch& launch) {
  const std::int64_t blocks = (groups + kThreads - 1) / kThreads;
  const std::int64_t most = static_cast<std::int64_t>(launch.num_sms) * 8;
  launch_kernel("hmlp_fold", launch, hmlp_fold_kernel<T>,
                static_cast<unsigned>(blocks < most ? blocks : most), kThreads, 0, p);
}

}  // namespace

void hmlp_fold(const HmlpFoldParams& p, const Launch& launch) {
  const std::int64_t cells = static_cast<std::int64_t>(p.frames / p.frame_fold) *
                             (p.side / p.side_fold) * (p.side / p.side_fold);
  const std::int64_t groups = p.num_patches * cells * (p.y_row_stride / 8);
  if (groups == 0) return;
  if (p.dtype == DType::kF32) return hmlp_fold_typed<float>(p, groups, launch);
  hmlp_fold_typed<std::uint16_t>(p, groups, launch);
}

}  // namespace tml::cuda
