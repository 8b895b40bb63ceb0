// The installed module on torch tensors, driven from C++: the way to put a debugger under a call
// that Python makes.
#include <pybind11/embed.h>

#include <cstdint>
#include <string>

#include "core/contract.h"
#include "cpu/cpu.h"
#include "tests/check.h"

namespace py = pybind11;

namespace tml::tests {
namespace {

template <class T>
T* data_of(const py::object& tensor) {
  return reinterpret_cast<T*>(tensor.attr("data_ptr")().cast<std::uintptr_t>());
}

bool equal(const py::object& a, const py::object& b) {
  return py::module_::import("torch").attr("equal")(a, b).cast<bool>();
}

TML_TEST(python_module_has_our_contract) {
  const py::object ext = py::module_::import("tml_core._ext");
  TML_CHECK_EQUAL(ext.attr("CONTRACT_VERSION").cast<int>(), contract::kVersion);
  TML_CHECK_EQUAL(ext.attr("PAGE_LEN").cast<int>(), contract::kPageLen);
}

TML_TEST(python_linear_and_cpp_linear_agree) {
  const py::module_ torch = py::module_::import("torch");
  const py::module_ ops = py::module_::import("tml_core.ops.linear");
  torch.attr("manual_seed")(3);
  const py::object x = torch.attr("randn")(17, 96), w = torch.attr("randn")(70, 96);
  const py::object packed = ops.attr("pack_weight")(w);
  const py::object y = ops.attr("linear")(x, packed);
  const py::object ours = torch.attr("full")(py::make_tuple(17, 70), 0.5);
  cpu::linear({data_of<float>(x), data_of<float>(packed.attr("data")), data_of<float>(ours), 96, 70,
               17, 96, 70, DType::kF32, DType::kF32, 2});
  TML_CHECK(equal(y, ours));
  const py::object error = (y - torch.attr("matmul")(x, w.attr("T"))).attr("abs")().attr("max")();
  TML_CHECK(error.attr("item")().cast<double>() < 1e-3);
}

TML_TEST(python_errors_reach_cpp) {
  const py::object ext = py::module_::import("tml_core._ext");
  std::string message;
  try {
    ext.attr("read_bytes")(py::int_(1), 1);
  } catch (const py::error_already_set& error) {
    TML_CHECK(error.matches(py::module_::import("tml_core.errors").attr("InvalidType")));
    message = error.what();
  }
  TML_CHECK(message.find("read_bytes: data must be a torch.Tensor, got int") != std::string::npos);
}

}  // namespace
}  // namespace tml::tests
