// How a launcher reaches the device: nothing here allocates or waits. Every kernel waits for the
// ones before it on the stream by grid_wait(), so that its start may overlap their end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/lent.h"
#include "cuda/simt.h"

namespace tml::cuda {

// Hands out aligned parts of a workspace; sizes alone when it starts at null.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(std::int64_t count) {
    T* part = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return part;
  }
  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

inline void check_workspace(const char* op, const Launch& launch, std::size_t needed) {
  if (launch.workspace_bytes < needed || (needed > 0 && launch.workspace == nullptr))
    throw std::invalid_argument(std::string(op) + ": workspace must be at least " +
                                std::to_string(needed) + " bytes, got " +
                                std::to_string(launch.workspace_bytes));
}

#if defined(__CUDACC__)
inline void check_cuda(const char* op, cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
}

template <class Params>
void launch_kernel(const char* op, const Launch& launch, void (*kernel)(Params), unsigned grid,
                   unsigned threads, std::size_t shared_bytes, const Params& params) {
  if (shared_bytes > (48u << 10))
    check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)));
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(launch.stream);
  config.attrs = &overlap;
  config.numAttrs = 1;
  check_cuda(op, cudaLaunchKernelEx(&config, kernel, params));
}
#else
template <class Params>
void launch_kernel(const char*, const Launch&, void (*kernel)(Params), unsigned grid,
                   unsigned threads, std::size_t shared_bytes, const Params& params) {
  simt::launch(grid, threads, shared_bytes, [&] { kernel(params); });
}
#endif

}  // namespace tml::cuda
