#include "core/memory.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "bindings/module.h"
#include "bindings/tensor.h"

namespace tml {
namespace {

struct Mapping {
  void* data;
  std::size_t num_bytes;
};

nb::ndarray<nb::pytorch, std::uint8_t, nb::ndim<1>> huge_empty(std::int64_t num_bytes) {
  if (num_bytes < 0) throw ArgumentError("huge_empty: num_bytes must be >= 0");
  auto* mapping = new Mapping{huge_alloc(static_cast<std::size_t>(num_bytes)),
                              static_cast<std::size_t>(num_bytes)};
  const nb::capsule owner(mapping, [](void* p) noexcept {
    auto* mapping = static_cast<Mapping*>(p);
    huge_free(mapping->data, mapping->num_bytes);
    delete mapping;
  });
  return {mapping->data, {static_cast<std::size_t>(num_bytes)}, owner};
}

}  // namespace

void bind_memory(nb::module_& m) {
  m.def("huge_empty", &huge_empty, nb::arg("num_bytes"),
        "uint8 [num_bytes] in zeroed huge-page memory, committed on first touch.");
  m.def("num_scratch_growths", &num_scratch_growths,
        "Times kernel scratch grew since the process started; a steady state adds none.");
}

}  // namespace tml
