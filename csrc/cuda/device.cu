#include "cuda/device.h"

#if defined(__CUDACC__)
#include <atomic>

#include "cuda/launch.h"

namespace tml::cuda {

int num_devices() {
  int count = 0;
  // No driver, one too old for this runtime, or no device: all mean none.
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

std::string device_problem(int device) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return std::string("no CUDA device can be used: ") + cudaGetErrorString(status);
  }
  if (device < 0 || device >= count)
    return "there is no CUDA device " + std::to_string(device) + ", only " + std::to_string(count);
  int major = 0, minor = 0;
  check_cuda("cuda", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check_cuda("cuda", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major != 9 || minor != 0)
    return "CUDA device " + std::to_string(device) + " has compute capability " +
           std::to_string(major) + "." + std::to_string(minor) +
           "; the kernels are built for 9.0 (H100, H200)";
  return "";
}

int num_sms(int device) {
  static std::atomic<int> counts[64];
  if (device < 0 || device >= 64) throw std::invalid_argument("cuda: no such device");
  int count = counts[device].load(std::memory_order_relaxed);
  if (count == 0) {
    check_cuda("cuda", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    counts[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

DeviceGuard::DeviceGuard(int device) {
  check_cuda("cuda", cudaGetDevice(&before_));
  is_other_ = before_ != device;
  if (is_other_) check_cuda("cuda", cudaSetDevice(device));
}

DeviceGuard::~DeviceGuard() {
  if (is_other_) cudaSetDevice(before_);
}

}  // namespace tml::cuda
#endif
