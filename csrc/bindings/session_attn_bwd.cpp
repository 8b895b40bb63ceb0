#include "ops/session_attn_bwd.h"

#include <nanobind/nanobind.h>

#include "bindings/module.h"
#include "bindings/step_batch.h"
#include "core/contract.h"
#include "cpu/cpu.h"

namespace tml {
namespace {

constexpr const char* kOp = "session_attn_bwd";
// As in session_attn: rows of q and r are staged 128 k-steps wide, the heads of a group in 64 rows.
constexpr std::int64_t kMaxSteps = 128;
constexpr std::int64_t kMaxGroup = 64;

void check_sizes(const Tensor& q, const Tensor& k, const Tensor& r) {
  const std::int64_t heads = q.size(1), kv_heads = k.size(1), dim = q.size(2);
  if (dim == 0 || dim % contract::kLanes != 0 || dim > 128)
    q.refuse("of a head_dim that is a multiple of 16 up to 128", std::to_string(dim));
  if (kv_heads == 0 || heads == 0 || heads % kv_heads != 0 || heads / kv_heads > kMaxGroup)
    q.refuse("of heads that are 1 to " + std::to_string(kMaxGroup) + " times the " +
                 std::to_string(kv_heads) + " KV heads",
             std::to_string(heads) + " heads");
  if (r.size(2) == 0 || num_k_steps(r.type(), r.size(2)) > kMaxSteps)
    r.refuse("1 to " + std::to_string(kMaxSteps) + " k-steps wide", std::to_string(r.size(2)));
}

void session_attn_bwd(nb::handle q_h, nb::handle k_h, nb::handle v_h, nb::handle r_h,
                      nb::handle rel_bank_h, nb::handle out_h, nb::handle lse_h, nb::handle d_out_h,
                      nb::handle dq_h, nb::handle dk_h, nb::handle dv_h, nb::handle dr_h,
                      nb::handle dbank_h, nb::handle cu_tokens, nb::handle slots,
                      nb::handle start_pos, nb::handle visible_end, std::int64_t window,
                      float scale, int num_threads) {
  const Tensor q(q_h, kOp, "q"), k(k_h, kOp, "k"), v(v_h, kOp, "v"), r(r_h, kOp, "r");
  const Tensor rel_bank(rel_bank_h, kOp, "rel_bank"), dbank(dbank_h, kOp, "dbank");
  const Tensor out(out_h, kOp, "out"), lse(lse_h, kOp, "lse"), d_out(d_out_h, kOp, "d_out");
  const Tensor dq(dq_h, kOp, "dq"), dk(dk_h, kOp, "dk"), dv(dv_h, kOp, "dv"), dr(dr_h, kOp, "dr");
  q.floating().rank(3).contiguous();
  const DType dtype = q.type();
  const std::int64_t num_tokens = q.size(0), heads = q.size(1), dim = q.size(2);
  k.dtype(dtype).shape({num_tokens, kAny, dim}).contiguous();
  const std::int64_t kv_heads = k.size(1);
  v.dtype(dtype).shape({num_tokens, kv_heads, dim}).contiguous();
  r.dtype(dtype).shape({num_tokens, heads, kAny}).contiguous();
  check_sizes(q, k, r);
  const std::int64_t rel_dim = r.size(2);
  dbank.dtype(DType::kF32).shape({rel_dim, kAny}).contiguous();
  const std::int64_t rel_len = dbank.size(1);
  if (rel_len < 1) dbank.refuse("[C, R] with R >= 1", std::to_string(rel_len));
  const std::int64_t steps = num_k_steps(dtype, rel_dim), width = rel_len + 2 * kRelPad;
  rel_bank.dtype(dtype).contiguous().aligned(64);
  if (dtype == DType::kBf16)
    rel_bank.shape({steps, width, 2});
  else
    rel_bank.shape({steps, width});
  for (const Tensor* tensor : {&out, &d_out})
    tensor->dtype(dtype).shape({num_tokens, heads * dim}).contiguous();
  lse.dtype(DType::kF32).shape({num_tokens, heads}).contiguous();
  dq.dtype(dtype).shape({num_tokens, heads, dim}).contiguous();
  for (const Tensor* tensor : {&dk, &dv})
    tensor->dtype(dtype).shape({num_tokens, kv_heads, dim}).contiguous();
  dr.dtype(dtype).shape({num_tokens, heads, rel_dim}).contiguous();
  if (window < 0)
    throw ArgumentError("session_attn_bwd: window must be >= 0 (0: all keys), got " +
                        std::to_string(window));
  SessionAttnBwdParams params{};
  const Tensor slots_tensor(slots, kOp, "slots");
  params.batch = batch_arg(kOp, cu_tokens, slots, start_pos, visible_end, num_tokens,
                           slots_tensor.rank(1).size(0));
  if (params.batch.visible_end == nullptr)
    throw ArgumentError("session_attn_bwd: start_pos and visible_end must be tensors, got None");
  for (std::int32_t s = 0; s < params.batch.num_seqs; ++s)
    if (params.batch.start_pos[s] != 0)
      throw ArgumentError("session_attn_bwd: start_pos[" + std::to_string(s) +
                          "] must be 0 (whole sequences), got " +
                          std::to_string(params.batch.start_pos[s]));
  params.q = q.data();
  params.k = k.data();
  params.v = v.data();
  params.r = r.data();
  params.rel_bank = rel_bank.data();
  params.out = out.data();
  params.lse = lse.data<const float>();
  params.d_out = d_out.data();
  params.dq = dq.data();
  params.dk = dk.data();
  params.dv = dv.data();
  params.dr = dr.data();
  params.dbank = dbank.data<float>();
  params.window = window;
  params.rel_len = rel_len;
  params.rel_dim = static_cast<std::int32_t>(rel_dim);
  params.num_heads = static_cast<std::int32_t>(heads);
  params.num_kv_heads = static_cast<std::int32_t>(kv_heads);
  params.head_dim = static_cast<std::int32_t>(dim);
  params.scale = scale;
  params.dtype = dtype;
  params.num_threads = num_threads;
  nb::gil_scoped_release release;
  cpu::session_attn_bwd(params);
}

}  // namespace

void bind_session_attn_bwd(nb::module_& m) {
  m.def("session_attn_bwd", &session_attn_bwd, nb::arg("q"), nb::arg("k"), nb::arg("v"),
        nb::arg("r"), nb::arg("rel_bank"), nb::arg("out"), nb::arg("lse"), nb::arg("d_out"),
        nb::arg("dq"), nb::arg("dk"), nb::arg("dv"), nb::arg("dr"), nb::arg("dbank"),
        nb::arg("cu_tokens"), nb::arg("slots"), nb::arg("start_pos").none(),
        nb::arg("visible_end").none(), nb::arg("window"), nb::arg("scale"), nb::arg("num_threads"));
}

}  // namespace tml
