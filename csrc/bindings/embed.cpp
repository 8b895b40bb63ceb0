#include <nanobind/nanobind.h>

#include "bindings/module.h"
#include "bindings/tensor.h"
#include "cpu/cpu.h"

namespace tml {
namespace {

std::string range_text(std::int64_t end) { return "in [0, " + std::to_string(end) + ")"; }

void embed(nb::handle ids_h, nb::handle table_h, nb::handle weight_h, float eps, nb::handle y_h,
           int num_threads) {
  const Tensor ids(ids_h, "embed", "ids");
  const Tensor table(table_h, "embed", "table");
  const Tensor weight(weight_h, "embed", "weight");
  const Tensor y(y_h, "embed", "out");
  ids.dtype(DType::kI64).rank(1).contiguous();
  table.floating().rank(2).rows_contiguous();
  weight.dtype(table.type()).shape({table.size(1)}).contiguous();
  y.dtype(table.type()).shape({ids.size(0), table.size(1)}).rows_contiguous();
  const auto* id = ids.data<const std::int64_t>();
  for (std::int64_t t = 0; t < ids.size(0); ++t)
    if (id[t] < 0 || id[t] >= table.size(0))
      throw ArgumentError("embed: ids[" + std::to_string(t) + "] must be " +
                          range_text(table.size(0)) + ", got " + std::to_string(id[t]));
  const EmbedParams params{id,          table.data(), weight.data(), y.data(), table.stride(0),
                           y.stride(0), ids.size(0),  table.size(1), eps,      table.type(),
                           num_threads};
  nb::gil_scoped_release release;
  cpu::embed(params);
}

void dmel_embed(nb::handle bins_h, nb::handle table_h, std::int64_t num_levels, nb::handle weight_h,
                float eps, nb::handle y_h, int num_threads) {
  const Tensor bins(bins_h, "dmel_embed", "bins");
  const Tensor table(table_h, "dmel_embed", "table");
  const Tensor weight(weight_h, "dmel_embed", "weight");
  const Tensor y(y_h, "dmel_embed", "out");
  bins.dtype(DType::kI32).rank(2).contiguous();
  table.floating().rank(2).rows_contiguous();
  const std::int64_t num_channels = bins.size(1);
  if (num_levels < 1)
    throw ArgumentError("dmel_embed: num_levels must be at least 1, got " +
                        std::to_string(num_levels));
  if (table.size(0) % num_levels != 0 || table.size(0) / num_levels != num_channels)
    table.refuse(
        std::to_string(num_channels) + " channels * " + std::to_string(num_levels) + " levels high",
        std::to_string(table.size(0)) + " rows");
  weight.dtype(table.type()).shape({table.size(1)}).contiguous();
  y.dtype(table.type()).shape({bins.size(0), table.size(1)}).rows_contiguous();
  const auto* bin = bins.data<const std::int32_t>();
  for (std::int64_t i = 0; i < bins.numel(); ++i)
    if (bin[i] < 0 || bin[i] >= num_levels)
      throw ArgumentError("dmel_embed: bins[" + std::to_string(i / num_channels) + ", " +
                          std::to_string(i % num_channels) + "] must be " + range_text(num_levels) +
                          ", got " + std::to_string(bin[i]));
  const DmelEmbedParams params{
      bin,         table.data(), weight.data(), y.data(),   table.stride(0),
      y.stride(0), bins.size(0), num_channels,  num_levels, table.size(1),
      eps,         table.type(), num_threads};
  nb::gil_scoped_release release;
  cpu::dmel_embed(params);
}

}  // namespace

void bind_embed(nb::module_& m) {
  m.def("embed", &embed, nb::arg("ids"), nb::arg("table"), nb::arg("weight"), nb::arg("eps"),
        nb::arg("out"), nb::arg("num_threads"));
  m.def("dmel_embed", &dmel_embed, nb::arg("bins"), nb::arg("table"), nb::arg("num_levels"),
        nb::arg("weight"), nb::arg("eps"), nb::arg("out"), nb::arg("num_threads"));
}

}  // namespace tml
