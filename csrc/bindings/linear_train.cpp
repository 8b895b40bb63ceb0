#include "ops/linear_train.h"

#include <nanobind/nanobind.h>

#include "bindings/module.h"
#include "bindings/tensor.h"
#include "cpu/cpu.h"

namespace tml {
namespace {

// Of the given type or fp32.
void check_out_type(const Tensor& out, DType dtype) {
  if (out.type() != dtype) out.dtype(DType::kF32);
}

void linear_plain(nb::handle x_h, nb::handle w_h, nb::handle y_h, int num_threads) {
  const Tensor x(x_h, "linear", "x"), w(w_h, "linear", "weight"), y(y_h, "linear", "out");
  x.floating().rank(2).rows_contiguous();
  w.dtype(x.type()).shape({kAny, x.size(1)}).rows_contiguous();
  y.shape({x.size(0), w.size(0)}).rows_contiguous();
  check_out_type(y, x.type());
  const LinearPlainParams params{x.data(),    w.data(),    y.data(),  x.stride(0),
                                 w.stride(0), y.stride(0), x.size(0), x.size(1),
                                 w.size(0),   x.type(),    y.type(),  num_threads};
  nb::gil_scoped_release release;
  cpu::linear_plain(params);
}

void linear_dgrad(nb::handle dy_h, nb::handle w_h, nb::handle dx_h, int num_threads) {
  constexpr const char* kOp = "linear_dgrad";
  const Tensor dy(dy_h, kOp, "dy"), w(w_h, kOp, "weight"), dx(dx_h, kOp, "out");
  dy.floating().rank(2).rows_contiguous();
  w.dtype(dy.type()).shape({dy.size(1), kAny}).rows_contiguous();
  dx.shape({dy.size(0), w.size(1)}).rows_contiguous();
  check_out_type(dx, dy.type());
  const LinearDgradParams params{dy.data(),   w.data(),     dx.data(),  dy.stride(0),
                                 w.stride(0), dx.stride(0), dy.size(0), w.size(1),
                                 dy.size(1),  dy.type(),    dx.type(),  num_threads};
  nb::gil_scoped_release release;
  cpu::linear_dgrad(params);
}

void linear_wgrad(nb::handle dy_h, nb::handle x_h, nb::handle dw_h, int num_threads) {
  constexpr const char* kOp = "linear_wgrad";
  const Tensor dy(dy_h, kOp, "dy"), x(x_h, kOp, "x"), dw(dw_h, kOp, "out");
  dy.floating().rank(2).rows_contiguous();
  x.dtype(dy.type()).shape({dy.size(0), kAny}).rows_contiguous();
  dw.shape({dy.size(1), x.size(1)}).rows_contiguous();
  check_out_type(dw, dy.type());
  const LinearWgradParams params{dy.data(),   x.data(),     dw.data(),  dy.stride(0),
                                 x.stride(0), dw.stride(0), dy.size(0), x.size(1),
                                 dy.size(1),  dy.type(),    dw.type(),  num_threads};
  nb::gil_scoped_release release;
  cpu::linear_wgrad(params);
}

}  // namespace

void bind_linear_train(nb::module_& m) {
  m.def("linear_plain", &linear_plain, nb::arg("x"), nb::arg("weight"), nb::arg("out"),
        nb::arg("num_threads"));
  m.def("linear_dgrad", &linear_dgrad, nb::arg("dy"), nb::arg("weight"), nb::arg("out"),
        nb::arg("num_threads"));
  m.def("linear_wgrad", &linear_wgrad, nb::arg("dy"), nb::arg("x"), nb::arg("out"),
        nb::arg("num_threads"));
}

}  // namespace tml
