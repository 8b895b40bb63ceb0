#include <nanobind/nanobind.h>

#include "bindings/module.h"
#include "bindings/step_batch.h"
#include "core/contract.h"
#include "cpu/cpu.h"

namespace tml {
namespace {

constexpr const char* kOp = "session_attn";
// Rows of q and r are staged 128 k-steps wide, and the heads of a group in 64 rows.
constexpr std::int64_t kMaxSteps = 128;
constexpr std::int64_t kMaxGroup = 64;

void check_sizes(const Tensor& q, const Tensor& r, const Tensor& pages, const KvPages& kv) {
  const std::int64_t dim = kv.head_dim;
  if (dim % contract::kLanes != 0 || dim > 128)
    pages.refuse("of a head_dim that is a multiple of 16 up to 128",
                 "head_dim " + std::to_string(dim));
  const std::int64_t heads = q.size(1), kv_heads = kv.num_kv_heads;
  if (kv_heads == 0 || heads == 0 || heads % kv_heads != 0 || heads / kv_heads > kMaxGroup)
    q.refuse("of heads that are 1 to " + std::to_string(kMaxGroup) + " times the " +
                 std::to_string(kv_heads) + " KV heads",
             std::to_string(heads) + " heads");
  if (r.size(2) == 0 || num_k_steps(r.type(), r.size(2)) > kMaxSteps)
    r.refuse("1 to " + std::to_string(kMaxSteps) + " k-steps wide", std::to_string(r.size(2)));
}

void session_attn(nb::handle q_h, nb::handle r_h, nb::handle rel_bank_h, nb::handle pages_h,
                  std::int64_t layer, nb::handle table_h, nb::handle cu_tokens, nb::handle slots,
                  nb::handle start_pos, nb::handle visible_end, std::int64_t window, float scale,
                  std::int64_t rel_len, nb::handle out_h, nb::handle lse_h, int num_threads) {
  const Tensor q(q_h, kOp, "q"), r(r_h, kOp, "r"), rel_bank(rel_bank_h, kOp, "rel_bank");
  const Tensor pages(pages_h, kOp, "pages"), table(table_h, kOp, "table"), out(out_h, kOp, "out");
  q.floating().rank(3);
  const DType dtype = q.type();
  SessionAttnParams params{};
  params.kv = pages_arg(kOp, pages, layer, table, dtype);
  const std::int64_t num_tokens = q.size(0), heads = q.size(1), dim = params.kv.head_dim;
  q.shape({kAny, kAny, dim}).contiguous();
  r.dtype(dtype).shape({num_tokens, heads, kAny}).contiguous();
  check_sizes(q, r, pages, params.kv);
  if (rel_len < 1)
    throw ArgumentError("session_attn: rel_len must be >= 1, got " + std::to_string(rel_len));
  const std::int64_t steps = num_k_steps(dtype, r.size(2)), width = rel_len + 2 * kRelPad;
  rel_bank.dtype(dtype).contiguous().aligned(64);
  if (dtype == DType::kBf16)
    rel_bank.shape({steps, width, 2});
  else
    rel_bank.shape({steps, width});
  out.dtype(dtype).shape({num_tokens, heads * dim}).contiguous();
  if (!lse_h.is_none()) {
    const Tensor lse(lse_h, kOp, "lse");
    lse.dtype(DType::kF32).shape({num_tokens, heads}).contiguous();
    params.lse = lse.data<float>();
  }
  if (window < 0)
    throw ArgumentError("session_attn: window must be >= 0 (0: all keys), got " +
                        std::to_string(window));
  params.batch =
      batch_arg(kOp, cu_tokens, slots, start_pos, visible_end, num_tokens, table.size(0));
  if (params.batch.visible_end == nullptr)
    throw ArgumentError("session_attn: start_pos and visible_end must be tensors, got None");
  check_visible_pages(kOp, params.batch, params.kv, pages.size(0), window);
  params.q = q.data();
  params.r = r.data();
  params.rel_bank = rel_bank.data();
  params.out = out.data();
  params.window = window;
  params.rel_len = rel_len;
  params.rel_dim = static_cast<std::int32_t>(r.size(2));
  params.num_heads = static_cast<std::int32_t>(heads);
  params.scale = scale;
  params.dtype = dtype;
  params.num_threads = num_threads;
  nb::gil_scoped_release release;
  cpu::session_attn(params);
}

}  // namespace

void bind_session_attn(nb::module_& m) {
  m.def("session_attn", &session_attn, nb::arg("q"), nb::arg("r"), nb::arg("rel_bank"),
        nb::arg("pages"), nb::arg("layer"), nb::arg("table"), nb::arg("cu_tokens"),
        nb::arg("slots"), nb::arg("start_pos").none(), nb::arg("visible_end").none(),
        nb::arg("window"), nb::arg("scale"), nb::arg("rel_len"), nb::arg("out"),
        nb::arg("lse").none(), nb::arg("num_threads"));
}

}  // namespace tml
