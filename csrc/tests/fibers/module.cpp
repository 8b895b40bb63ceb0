// _fibers: the bindings of csrc/bindings/cuda*.cpp over the kernels as fibers, on CPU tensors. In
// its place tml_core.ops.cuda runs everything that stands on it, without a GPU. Never in the wheel.
// tml_core._ext must be imported first: nanobind's runtime is shared, and with it _ext's errors.
#include <nanobind/nanobind.h>

namespace tml {
void bind_cuda(nanobind::module_& m);
void bind_cuda_train(nanobind::module_& m);
}  // namespace tml

NB_MODULE(_fibers, m) {
  tml::bind_cuda(m);
  tml::bind_cuda_train(m);
}
