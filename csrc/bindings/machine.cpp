#include "ops/machine.h"

#include <nanobind/nanobind.h>

#include <string>

#include "bindings/module.h"
#include "bindings/tensor.h"
#include "cpu/cpu.h"

namespace tml {
namespace {

void check_threads(const char* op, int num_threads) {
  if (num_threads < 1)
    throw ArgumentError(std::string(op) + ": num_threads must be >= 1, got " +
                        std::to_string(num_threads));
}

std::uint64_t read_bytes(nb::handle data_h, int num_threads) {
  const Tensor data(data_h, "read_bytes", "data");
  data.dtype(DType::kU8).rank(1).contiguous().aligned(64);
  if (data.size(0) % 8 != 0)
    data.refuse("a multiple of 8 bytes long", std::to_string(data.size(0)));
  check_threads("read_bytes", num_threads);
  std::uint64_t sum = 0;
  const ReadBytesParams params{data.data<std::uint64_t>(), &sum, data.size(0) / 8, num_threads};
  nb::gil_scoped_release release;
  cpu::read_bytes(params);
  return sum;
}

double dot_peak(std::int64_t num_steps, bool bf16, int num_threads) {
  if (num_steps < 0) throw ArgumentError("dot_peak: num_steps must be >= 0");
  check_threads("dot_peak", num_threads);
  float sum = 0.0f;
  double flops = 0.0;
  const DotPeakParams params{&sum, &flops, num_steps, bf16 ? DType::kBf16 : DType::kF32,
                             num_threads};
  nb::gil_scoped_release release;
  cpu::dot_peak(params);
  return flops;
}

}  // namespace

void bind_machine(nb::module_& m) {
  m.def("read_bytes", &read_bytes, nb::arg("data"), nb::arg("num_threads"),
        "Read uint8 [n] once (n a multiple of 8) and return the sum of its 64-bit words mod 2^64.");
  m.def("dot_peak", &dot_peak, nb::arg("num_steps"), nb::arg("bf16"), nb::arg("num_threads"),
        "Run the kernels' inner step on registers; returns the floating-point operations done.");
}

}  // namespace tml
