// What kernel files are written against: CUDA under nvcc; under a host compiler the emulation of
// csrc/cuda/host, which runs the same kernels in the C++ tests on a machine without a GPU.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#define TML_DEVICE __device__ __forceinline__
#define TML_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
#define TML_GRID_CONSTANT __grid_constant__
#else
#include "cuda/host/simt.h"
#endif

namespace tml::cuda {

#if defined(__CUDACC__)
TML_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}
#else
TML_DEVICE unsigned char* shared_memory() { return simt::shared(); }
#endif

inline constexpr unsigned kFullMask = 0xffffffffu;

}  // namespace tml::cuda
