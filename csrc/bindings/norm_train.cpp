#include <nanobind/nanobind.h>

#include "bindings/module.h"
#include "bindings/tensor.h"
#include "cpu/cpu.h"

namespace tml {
namespace {

void rms_norm_bwd(nb::handle dy_h, nb::handle x_h, nb::handle weight_h, float eps, float divisor,
                  bool use_gelu, nb::handle dx_h, nb::handle dweight_h, int num_threads) {
  constexpr const char* kOp = "rms_norm_bwd";
  const Tensor dy(dy_h, kOp, "dy"), x(x_h, kOp, "x"), weight(weight_h, kOp, "weight");
  const Tensor dx(dx_h, kOp, "dx_out"), dweight(dweight_h, kOp, "dweight_out");
  x.floating().rank(2).rows_contiguous();
  const std::int64_t num_rows = x.size(0), dim = x.size(1);
  dy.dtype(x.type()).shape({num_rows, dim}).rows_contiguous();
  weight.dtype(x.type()).shape({dim}).contiguous();
  dx.dtype(x.type()).shape({num_rows, dim}).rows_contiguous();
  dweight.dtype(x.type()).shape({dim}).contiguous();
  const RmsNormBwdParams params{dy.data(),    x.data(),    weight.data(), dx.data(), dweight.data(),
                                dy.stride(0), x.stride(0), dx.stride(0),  num_rows,  dim,
                                eps,          divisor,     use_gelu,      x.type(),  num_threads};
  nb::gil_scoped_release release;
  cpu::rms_norm_bwd(params);
}

// The arguments embed_bwd and dmel_embed_bwd share.
struct TableGrad {
  TableGrad(const char* op, nb::handle dy_h, nb::handle table_h, nb::handle weight_h,
            nb::handle dtable_h, nb::handle dweight_h, std::int64_t num_tokens)
      : dy(dy_h, op, "dy"),
        table(table_h, op, "table"),
        weight(weight_h, op, "weight"),
        dtable(dtable_h, op, "dtable_out"),
        dweight(dweight_h, op, "dweight_out") {
    table.floating().rank(2).rows_contiguous();
    const std::int64_t dim = table.size(1);
    dy.dtype(table.type()).shape({num_tokens, dim}).rows_contiguous();
    weight.dtype(table.type()).shape({dim}).contiguous();
    dtable.dtype(table.type()).shape({table.size(0), dim}).contiguous();
    dweight.dtype(table.type()).shape({dim}).contiguous();
  }
  Tensor dy, table, weight, dtable, dweight;
};

// `count` indices, each in [0, end).
template <class Index>
void check_range(const char* what, const Index* index, std::int64_t count, std::int64_t end) {
  for (std::int64_t i = 0; i < count; ++i)
    if (index[i] < 0 || index[i] >= end)
      throw ArgumentError(std::string(what) + " must be in [0, " + std::to_string(end) + "), got " +
                          std::to_string(index[i]));
}

void embed_bwd(nb::handle dy_h, nb::handle ids_h, nb::handle table_h, nb::handle weight_h,
               float eps, nb::handle dtable_h, nb::handle dweight_h, int num_threads) {
  const Tensor ids(ids_h, "embed_bwd", "ids");
  ids.dtype(DType::kI64).rank(1).contiguous();
  const std::int64_t num_tokens = ids.size(0);
  const TableGrad g("embed_bwd", dy_h, table_h, weight_h, dtable_h, dweight_h, num_tokens);
  const auto* id = ids.data<const std::int64_t>();
  check_range("embed_bwd: ids", id, num_tokens, g.table.size(0));
  const EmbedBwdParams params{g.dy.data(),     id,
                              g.table.data(),  g.weight.data(),
                              g.dtable.data(), g.dweight.data(),
                              g.dy.stride(0),  g.table.stride(0),
                              num_tokens,      g.table.size(0),
                              g.table.size(1), eps,
                              g.table.type(),  num_threads};
  nb::gil_scoped_release release;
  cpu::embed_bwd(params);
}

void dmel_embed_bwd(nb::handle dy_h, nb::handle bins_h, nb::handle table_h, std::int64_t num_levels,
                    nb::handle weight_h, float eps, nb::handle dtable_h, nb::handle dweight_h,
                    int num_threads) {
  const Tensor bins(bins_h, "dmel_embed_bwd", "bins");
  bins.dtype(DType::kI32).rank(2).contiguous();
  const std::int64_t num_frames = bins.size(0), num_channels = bins.size(1);
  const TableGrad g("dmel_embed_bwd", dy_h, table_h, weight_h, dtable_h, dweight_h, num_frames);
  if (num_levels < 1 || g.table.size(0) != num_channels * num_levels)
    g.table.refuse(
        std::to_string(num_channels) + " channels * " + std::to_string(num_levels) + " levels high",
        std::to_string(g.table.size(0)) + " rows");
  const auto* bin = bins.data<const std::int32_t>();
  check_range("dmel_embed_bwd: bins", bin, bins.numel(), num_levels);
  const DmelEmbedBwdParams params{g.dy.data(),
                                  bin,
                                  g.table.data(),
                                  g.weight.data(),
                                  g.dtable.data(),
                                  g.dweight.data(),
                                  g.dy.stride(0),
                                  g.table.stride(0),
                                  num_frames,
                                  num_channels,
                                  num_levels,
                                  g.table.size(1),
                                  eps,
                                  g.table.type(),
                                  num_threads};
  nb::gil_scoped_release release;
  cpu::dmel_embed_bwd(params);
}

}  // namespace

void bind_norm_train(nb::module_& m) {
  m.def("rms_norm_bwd", &rms_norm_bwd, nb::arg("dy"), nb::arg("x"), nb::arg("weight"),
        nb::arg("eps"), nb::arg("divisor"), nb::arg("use_gelu"), nb::arg("dx_out"),
        nb::arg("dweight_out"), nb::arg("num_threads"));
  m.def("embed_bwd", &embed_bwd, nb::arg("dy"), nb::arg("ids"), nb::arg("table"), nb::arg("weight"),
        nb::arg("eps"), nb::arg("dtable_out"), nb::arg("dweight_out"), nb::arg("num_threads"));
  m.def("dmel_embed_bwd", &dmel_embed_bwd, nb::arg("dy"), nb::arg("bins"), nb::arg("table"),
        nb::arg("num_levels"), nb::arg("weight"), nb::arg("eps"), nb::arg("dtable_out"),
        nb::arg("dweight_out"), nb::arg("num_threads"));
}

}  // namespace tml
