// fold_blocks: a thread owns one sum; neighbouring threads read neighbouring partials.
#include "cuda/norm_bwd.h"

namespace tml::cuda {
namespace {

struct FoldParams {
  const float* partial;
  void* out;
  std::int64_t num_blocks, count;
};

template <class T>
TML_KERNEL(kRowThreads, 4)
fold_blocks_kernel(const TML_GRID_CONSTANT FoldParams p) {
  grid_launch_dependents();
  grid_wait();
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= p.count) return;
  float total = 0.0f;
#pragma unroll 8
  for (std::int64_t block = 0; block < p.num_blocks; ++block)
    total = __fadd_rn(total, p.partial[block * p.count + i]);
  put(static_cast<T*>(p.out) + i, total);
}

}  // namespace

void fold_blocks(const char* op, const Launch& launch, const float* partial,
                 std::int64_t num_blocks, std::int64_t count, void* out, DType dtype) {
  if (count == 0) return;
  const FoldParams params{partial, out, num_blocks, count};
  const unsigned grid = blocks_for(count, kRowThreads);
  if (dtype == DType::kF32)
    launch_kernel(op, launch, fold_blocks_kernel<float>, grid, kRowThreads, 0, params);
  else
    launch_kernel(op, launch, fold_blocks_kernel<std::uint16_t>, grid, kRowThreads, 0, params);
}

}  // namespace tml::cuda
