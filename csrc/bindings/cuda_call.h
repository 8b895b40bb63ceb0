// What every device op's binding is written with: where it runs, what it refuses without a device
// or a build for one, and how it lends a workspace.
#pragma once

#include <nanobind/nanobind.h>

#include "bindings/tensor.h"
#include "cuda/layout.h"

#ifdef TML_WITH_CUDA
#include "cuda/cuda.h"
#include "cuda/device.h"
#define TML_CUDA_OR(with, without) with
#else
#define TML_CUDA_OR(with, without) without
#endif

namespace tml {

[[noreturn]] inline void raise_unsupported(const std::string& message) {
  const nb::object type = nb::module_::import_("tml_core.errors").attr("Unsupported");
  PyErr_SetString(type.ptr(), message.c_str());
  throw nb::python_error();
}

#ifdef TML_FIBERS  // csrc/tests/fibers: the kernels run on the host
constexpr Place kPlace = Place::kCpu;
#else
constexpr Place kPlace = Place::kCuda;
#endif

// Why the kernels cannot run on a device of this machine; empty if they can.
inline std::string problem_of([[maybe_unused]] int device) {
  return TML_CUDA_OR(cuda::device_problem(device),
                     "this tml_core was built without CUDA; reinstall it with "
                     "-C cmake.define.TML_CUDA=ON where nvcc is found");
}

inline void require_build(const char* op) {
#ifndef TML_WITH_CUDA
  raise_unsupported(std::string(op) + ": " + problem_of(0));
#else
  (void)op;
#endif
}

// Where one op runs: the device of its first tensor, torch's current stream there.
class Call {
 public:
  explicit Call(const char* op) : op_(op) { require_build(op); }

  Tensor tensor(nb::handle object, const char* name) {
    const Tensor out(object, op_, name, kPlace);
    if (device_ < 0) {
      device_ = out.device_id();
      if (const std::string problem = problem_of(device_); !problem.empty())
        raise_unsupported(std::string(op_) + ": " + problem);
      if (kPlace == Place::kCuda) stream_ = current_cuda_stream(object, device_);
    } else if (out.device_id() != device_) {
      out.refuse("on device " + std::to_string(device_) + " like the first tensor",
                 "device " + std::to_string(out.device_id()));
    }
    return out;
  }
  // Products and pages: bf16 alone.
  Tensor bf16(nb::handle object, const char* name) {
    const Tensor out = tensor(object, name);
    out.dtype(DType::kBf16);
    return out;
  }
  void workspace(nb::handle object) {
    if (object.is_none()) return;
    const Tensor out = tensor(object, "workspace");
    out.dtype(DType::kU8).rank(1).contiguous().aligned(256);
    workspace_ = out.data();
    workspace_bytes_ = static_cast<std::size_t>(out.size(0));
  }
#ifdef TML_WITH_CUDA
  template <class Body>
  void run(const Body& body) const {
    nb::gil_scoped_release release;
    const cuda::DeviceGuard guard(device_);
    body(cuda::Launch{stream_, workspace_, workspace_bytes_, cuda::num_sms(device_)});
  }
#endif

 private:
  const char* op_;
  int device_ = -1;
  void* stream_ = nullptr;
  void* workspace_ = nullptr;
  std::size_t workspace_bytes_ = 0;
};

#ifdef TML_WITH_CUDA
#define TML_RUN(call, op, params) \
  (call).run([&](const cuda::Launch& launch) { cuda::op(params, launch); })
#else  // Call's constructor has refused already
#define TML_RUN(call, op, params) static_cast<void>(params)
#endif

inline void check_packed(const Tensor& weight, std::int64_t elements) {
  weight.shape({elements}).contiguous().aligned(16);
}
// Rows that cp.async reads sixteen bytes at a time.
inline void check_rows16(const Tensor& x) {
  x.rows_contiguous().aligned(16);
  if (x.size(0) > 1 && x.stride(0) % 8 != 0)
    x.refuse("of rows a multiple of 8 elements apart", std::to_string(x.stride(0)));
}

}  // namespace tml
