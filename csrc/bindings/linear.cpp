#include <nanobind/nanobind.h>

#include "bindings/module.h"
#include "bindings/tensor.h"
#include "core/contract.h"
#include "cpu/cpu.h"

namespace tml {
namespace {

void pack_weight(nb::handle w_h, nb::handle packed_h, int num_threads) {
  const Tensor w(w_h, "pack_weight", "w");
  w.floating().rank(2).rows_contiguous();
  const Tensor packed(packed_h, "pack_weight", "packed");
  const std::int64_t steps = num_k_steps(w.type(), w.size(1));
  packed.dtype(w.type()).contiguous().aligned(64);
  const std::int64_t panels = ceil_div(w.size(0), contract::kPanel);
  if (w.type() == DType::kBf16)
    packed.shape({panels, steps, contract::kPanel, 2});
  else
    packed.shape({panels, steps, contract::kPanel});
  const PackWeightParams params{w.data(),  packed.data(), w.stride(0), w.size(0),
                                w.size(1), w.type(),      num_threads};
  nb::gil_scoped_release release;
  cpu::pack_weight(params);
}

void linear(nb::handle x_h, nb::handle weight_h, nb::handle y_h, int num_threads) {
  const Tensor x(x_h, "linear", "x");
  const Tensor weight(weight_h, "linear", "weight");
  const Tensor y(y_h, "linear", "out");
  x.floating().rank(2).rows_contiguous();
  weight.dtype(x.type()).contiguous().aligned(64);
  const std::int64_t steps = num_k_steps(x.type(), x.size(1));
  if (x.type() == DType::kBf16)
    weight.shape({kAny, steps, contract::kPanel, 2});
  else
    weight.shape({kAny, steps, contract::kPanel});
  y.shape({x.size(0), kAny}).rows_contiguous();
  if (y.type() != x.type()) y.dtype(DType::kF32);
  if (ceil_div(y.size(1), contract::kPanel) != weight.size(0))
    y.refuse("at most " + std::to_string(weight.size(0) * contract::kPanel) +
                 " wide (the packed outputs)",
             std::to_string(y.size(1)));
  const LinearParams params{x.data(),  weight.data(), y.data(), x.stride(0), y.stride(0), x.size(0),
                            x.size(1), y.size(1),     x.type(), y.type(),    num_threads};
  nb::gil_scoped_release release;
  cpu::linear(params);
}

}  // namespace

void bind_linear(nb::module_& m) {
  m.def("pack_weight", &pack_weight, nb::arg("w"), nb::arg("packed"), nb::arg("num_threads"));
  m.def("linear", &linear, nb::arg("x"), nb::arg("weight"), nb::arg("out"), nb::arg("num_threads"));
}

}  // namespace tml
