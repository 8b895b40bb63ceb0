#include <nanobind/nanobind.h>

#include "bindings/module.h"
#include "bindings/tensor.h"
#include "cpu/cpu.h"

namespace tml {
namespace {

void rms_norm(nb::handle x_h, nb::handle weight_h, float eps, float divisor, bool use_gelu,
              nb::handle y_h, int num_threads) {
  const Tensor x(x_h, "rms_norm", "x");
  const Tensor weight(weight_h, "rms_norm", "weight");
  const Tensor y(y_h, "rms_norm", "out");
  x.floating().rank(2).rows_contiguous();
  weight.dtype(x.type()).shape({x.size(1)}).contiguous();
  y.dtype(x.type()).shape({x.size(0), x.size(1)}).rows_contiguous();
  const RmsNormParams params{x.data(),    weight.data(), y.data(),  x.stride(0),
                             y.stride(0), x.size(0),     x.size(1), eps,
                             divisor,     use_gelu,      x.type(),  num_threads};
  nb::gil_scoped_release release;
  cpu::rms_norm(params);
}

}  // namespace

void bind_rms_norm(nb::module_& m) {
  m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("divisor"),
        nb::arg("use_gelu"), nb::arg("out"), nb::arg("num_threads"));
}

}  // namespace tml
