// A borrowed view of a torch tensor, taken through torch's DLPack exchange API (no copy, no
// conversion), with refusals that name the op and the argument. Valid for the duration of a call.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "bindings/dlpack.h"
#include "core/dtype.h"

namespace nb = nanobind;

namespace tml {

// Raised to Python as tml_core.errors.InvalidArgument / InvalidType.
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
struct ArgumentTypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

inline constexpr std::int64_t kAny = -1;

enum class Place { kCpu, kCuda };

class Tensor {
 public:
  Tensor(nb::handle object, const char* op, const char* name, Place place = Place::kCpu);

  // Checks; each returns *this so that they chain.
  const Tensor& dtype(DType expected) const;
  const Tensor& floating() const;                                       // float32 or bfloat16
  const Tensor& shape(std::initializer_list<std::int64_t> dims) const;  // kAny matches all
  const Tensor& rank(int expected) const;
  const Tensor& contiguous() const;
  const Tensor& rows_contiguous() const;  // last dimension dense, rows may be strided
  const Tensor& aligned(std::size_t num_bytes) const;

  DType type() const { return dtype_; }
  int ndim() const { return view_.ndim; }
  int device_id() const { return view_.device.device_id; }
  std::int64_t size(int dim) const { return view_.shape[dim]; }
  std::int64_t stride(int dim) const;
  std::int64_t numel() const;
  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(view_.data) + view_.byte_offset);
  }
  [[noreturn]] void refuse(const std::string& expected, const std::string& got) const;

 private:
  std::string shape_text() const;

  DLTensor view_{};
  DType dtype_{};
  const char* op_;
  const char* name_;
};

// torch's current stream of a CUDA device (a cudaStream_t), asked through the same exchange API.
void* current_cuda_stream(nb::handle tensor, int device_id);

}  // namespace tml
