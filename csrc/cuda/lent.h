// What the caller of a device op lends to it for one launch.
#pragma once

#include <cstddef>

namespace tml::cuda {

struct Launch {
  void* stream;     // cudaStream_t
  void* workspace;  // device memory of at least <op>_workspace_bytes, 256-byte aligned
  std::size_t workspace_bytes;
  int num_sms;
};

}  // namespace tml::cuda
