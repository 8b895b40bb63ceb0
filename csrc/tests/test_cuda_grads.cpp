// The gradients of the row ops on the device, run on the host: the CPU kernels' bits.
#include <algorithm>

#include "cpu/cpu.h"
#include "tests/cuda_kit.h"

namespace tml::tests {
namespace {

template <class T>
std::vector<T> random_values(std::int64_t count, std::uint64_t seed);
template <>
std::vector<float> random_values(std::int64_t count, std::uint64_t seed) {
  return random_f32(static_cast<std::size_t>(count), seed);
}
template <>
std::vector<std::uint16_t> random_values(std::int64_t count, std::uint64_t seed) {
  return random_bf16(static_cast<std::size_t>(count), seed);
}
template <class T>
T poison();
template <>
float poison() {
  return __builtin_nanf("");
}
template <>
std::uint16_t poison() {
  return kPoison;
}
template <class T>
std::vector<T> poisoned(std::int64_t count) {
  return std::vector<T>(static_cast<std::size_t>(count), poison<T>());
}
template <class T>
constexpr DType dtype_of() {
  return sizeof(T) == 2 ? DType::kBf16 : DType::kF32;
}

// NaN where nobody wrote is equal too: bits are compared.
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// run(launch) with exactly the workspace asked for, poisoned.
template <class Run>
void with_workspace(std::size_t num_bytes, const Run& run) {
  std::vector<float> workspace(num_bytes / sizeof(float) + 1, poison<float>());
  run(host_launch(workspace.data(), num_bytes));
}

template <class T>
void check_rms_norm_bwd(std::int64_t rows, std::int64_t dim, float divisor, bool gelu) {
  const std::int64_t stride = dim + 3;
  const auto x = random_values<T>(rows * stride, 1), dy = random_values<T>(rows * stride, 2);
  const auto weight = random_values<T>(dim, 3);
  auto ours = poisoned<T>(rows * stride), theirs = ours;
  auto our_weight = poisoned<T>(dim), their_weight = our_weight;
  RmsNormBwdParams p{dy.data(), x.data(), weight.data(), ours.data(),   our_weight.data(),
                     stride,    stride,   stride,        rows,          dim,
                     1e-6f,     divisor,  gelu,          dtype_of<T>(), 1};
  with_workspace(cuda::rms_norm_bwd_workspace_bytes(p),
                 [&](const cuda::Launch& launch) { cuda::rms_norm_bwd(p, launch); });
  p.dx = theirs.data();
  p.dweight = their_weight.data();
  cpu::rms_norm_bwd(p);
  TML_CHECK(same_bits(ours, theirs));
  TML_CHECK(same_bits(our_weight, their_weight));
}

TML_TEST(cuda_rms_norm_bwd_is_the_op) {
  for (const std::int64_t dim : {1, 19, 256, 1000}) {
    check_rms_norm_bwd<std::uint16_t>(3, dim, 1.0f, false);
    check_rms_norm_bwd<std::uint16_t>(17, dim, 3.0f, true);
    check_rms_norm_bwd<float>(2, dim, 1.0f, true);
  }
  check_rms_norm_bwd<std::uint16_t>(1030, 24, 1.0f, false);  // more than two blocks of tokens
  check_rms_norm_bwd<float>(0, 24, 1.0f, false);
}

template <class T>
void check_embed_bwd(std::int64_t num_tokens, std::int64_t num_ids, std::int64_t dim) {
  const std::int64_t stride = dim + 5;
  const auto table = random_values<T>(num_ids * stride, 1),
             dy = random_values<T>(num_tokens * dim, 2);
  const auto weight = random_values<T>(dim, 3);
  Random random(4);
  std::vector<std::int64_t> ids(static_cast<std::size_t>(num_tokens));
  for (std::int64_t& id : ids) id = random.below(num_ids);
  std::vector<T> ours(static_cast<std::size_t>(num_ids * dim)), theirs = ours;
  auto our_weight = poisoned<T>(dim), their_weight = our_weight;
  EmbedBwdParams p{
      dy.data(), ids.data(), table.data(), weight.data(), ours.data(), our_weight.data(), dim,
      stride,    num_tokens, num_ids,      dim,           1e-6f,       dtype_of<T>(),     1};
  with_workspace(cuda::embed_bwd_workspace_bytes(p),
                 [&](const cuda::Launch& launch) { cuda::embed_bwd(p, launch); });
  p.dtable = theirs.data();
  p.dweight = their_weight.data();
  cpu::embed_bwd(p);
  TML_CHECK(same_bits(ours, theirs));
  TML_CHECK(same_bits(our_weight, their_weight));
}

TML_TEST(cuda_embed_bwd_is_the_op) {
  check_embed_bwd<std::uint16_t>(5, 9, 1100);  // columns of two blocks of threads
  check_embed_bwd<float>(40, 3, 19);
  check_embed_bwd<std::uint16_t>(1100, 7, 16);  // an id's tokens in three blocks
  check_embed_bwd<float>(0, 4, 16);
}

template <class T>
void check_dmel_embed_bwd(std::int64_t frames, std::int64_t channels, std::int64_t levels,
                          std::int64_t dim) {
  const std::int64_t rows = channels * levels, stride = dim + 1;
  const auto table = random_values<T>(rows * stride, 1), dy = random_values<T>(frames * dim, 2);
  const auto weight = random_values<T>(dim, 3);
  Random random(4);
  std::vector<std::int32_t> bins(static_cast<std::size_t>(frames * channels));
  for (std::int32_t& bin : bins) bin = static_cast<std::int32_t>(random.below(levels));
  std::vector<T> ours(static_cast<std::size_t>(rows * dim)), theirs = ours;
  auto our_weight = poisoned<T>(dim), their_weight = our_weight;
  DmelEmbedBwdParams p{dy.data(),     bins.data(),   table.data(),
                       weight.data(), ours.data(),   our_weight.data(),
                       dim,           stride,        frames,
                       channels,      levels,        dim,
                       1e-6f,         dtype_of<T>(), 1};
  with_workspace(cuda::dmel_embed_bwd_workspace_bytes(p),
                 [&](const cuda::Launch& launch) { cuda::dmel_embed_bwd(p, launch); });
  p.dtable = theirs.data();
  p.dweight = their_weight.data();
  cpu::dmel_embed_bwd(p);
  TML_CHECK(same_bits(ours, theirs));
  TML_CHECK(same_bits(our_weight, their_weight));
}

TML_TEST(cuda_dmel_embed_bwd_is_the_op) {
  check_dmel_embed_bwd<std::uint16_t>(19, 5, 4, 40);
  check_dmel_embed_bwd<float>(3, 2, 16, 1030);
  check_dmel_embed_bwd<std::uint16_t>(600, 2, 3, 16);
}

template <class T>
void check_sconv_norm_bwd(const std::vector<std::int32_t>& cu, std::int64_t dim, bool has_norm) {
  const std::int64_t tokens = cu.back(), stride = dim + 8;
  const auto dnormed = random_values<T>(tokens * stride, 1);
  const auto dsum = random_values<T>(tokens * stride, 2), x = random_values<T>(tokens * stride, 3);
  const auto sum = random_values<T>(tokens * stride, 4), weight = random_values<T>(dim, 5);
  const auto taps = random_f32(static_cast<std::size_t>(dim * 4), 6);
  std::vector<T> dx[2], dresidual[2], dnorm[2];
  std::vector<float> dconv[2];
  for (int i = 0; i < 2; ++i) {
    dx[i] = dresidual[i] = poisoned<T>(tokens * dim);
    dnorm[i] = poisoned<T>(dim);
    dconv[i] = poisoned<float>(dim * 4);
    SconvNormBwdParams p{};
    p.dnormed = has_norm ? dnormed.data() : nullptr;
    p.dsum = dsum.data();
    p.x = x.data();
    p.sum = sum.data();
    p.conv_weight = taps.data();
    p.norm_weight = has_norm ? weight.data() : nullptr;
    p.cu_tokens = cu.data();
    p.dx = dx[i].data();
    p.dresidual = dresidual[i].data();
    p.dconv = dconv[i].data();
    p.dnorm = has_norm ? dnorm[i].data() : nullptr;
    p.dnormed_row_stride = p.dsum_row_stride = p.x_row_stride = p.sum_row_stride = stride;
    p.num_seqs = static_cast<std::int64_t>(cu.size()) - 1;
    p.num_tokens = tokens;
    p.dim = dim;
    p.eps = 1e-6f;
    p.dtype = dtype_of<T>();
    p.num_threads = 1;
    if (i == 0)
      with_workspace(cuda::sconv_norm_bwd_workspace_bytes(p),
                     [&](const cuda::Launch& launch) { cuda::sconv_norm_bwd(p, launch); });
    else
      cpu::sconv_norm_bwd(p);
  }
  TML_CHECK(same_bits(dx[0], dx[1]));
  TML_CHECK(same_bits(dresidual[0], dresidual[1]));
  TML_CHECK(same_bits(dconv[0], dconv[1]));
  TML_CHECK(same_bits(dnorm[0], dnorm[1]));
}

TML_TEST(cuda_sconv_norm_bwd_is_the_op) {
  const std::vector<std::int32_t> ragged = {0, 0, 1, 3, 3, 8, 19, 19};
  check_sconv_norm_bwd<std::uint16_t>(ragged, 48, true);
  check_sconv_norm_bwd<float>(ragged, 272, true);
  check_sconv_norm_bwd<std::uint16_t>(ragged, 32, false);
  check_sconv_norm_bwd<std::uint16_t>({0, 510, 515, 1027}, 16, true);
}

template <class T>
void check_router_bwd(std::int64_t tokens, std::int64_t dim, std::int32_t experts,
                      std::int32_t shared, std::int32_t top_k, bool has_dlogits) {
  const std::int64_t outputs = experts + shared, stride = dim + 3;
  const auto x = random_values<T>(tokens * stride, 1);
  const auto weight = random_values<float>(outputs * dim, 2);
  const auto logits = random_values<float>(tokens * outputs, 3);
  const auto dweights = random_values<float>(tokens * top_k, 4);
  const auto dgammas = random_values<float>(tokens * shared, 5);
  const auto dlogits = random_values<float>(tokens * outputs, 6);
  Random random(7);
  std::vector<std::int32_t> ids;
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::int32_t id = 0;  // ascending, each once; the last expert is never chosen
    for (std::int32_t j = 0; j < top_k; ++j) {
      const std::int32_t room = experts - 1 - top_k + j - id;
      id += static_cast<std::int32_t>(random.below(room > 0 ? room : 1));
      ids.push_back(id++);
    }
  }
  std::vector<T> dx[2];
  std::vector<float> dw[2], dscale[2];
  for (int i = 0; i < 2; ++i) {
    dx[i] = poisoned<T>(tokens * dim);
    dw[i] = poisoned<float>(outputs * dim);
    dscale[i] = poisoned<float>(1);
    const RouterBwdParams p{x.data(),
                            weight.data(),
                            ids.data(),
                            logits.data(),
                            dweights.data(),
                            dgammas.data(),
                            has_dlogits ? dlogits.data() : nullptr,
                            dx[i].data(),
                            dw[i].data(),
                            dscale[i].data(),
                            stride,
                            tokens,
                            dim,
                            experts,
                            shared,
                            top_k,
                            2.5f,
                            dtype_of<T>(),
                            1};
    if (i == 0)
      with_workspace(cuda::router_bwd_workspace_bytes(p),
                     [&](const cuda::Launch& launch) { cuda::router_bwd(p, launch); });
    else
      cpu::router_bwd(p);
  }
  TML_CHECK(same_bits(dx[0], dx[1]));
  TML_CHECK(same_bits(dw[0], dw[1]));
  TML_CHECK(same_bits(dscale[0], dscale[1]));
}

TML_TEST(cuda_router_bwd_is_the_op) {
  check_router_bwd<std::uint16_t>(11, 1030, 12, 2, 4, false);
  check_router_bwd<float>(300, 20, 7, 1, 3, true);
  check_router_bwd<std::uint16_t>(1100, 16, 5, 0, 2, false);
}

struct Prologue {
  std::int64_t heads, kv_heads, dim, d_rel, tokens, width, stride;
  std::vector<std::int32_t> cu;
  std::vector<std::uint16_t> qkvr, q_norm, k_norm;
  std::vector<float> k_conv, v_conv;

  Prologue(std::vector<std::int32_t> bounds, std::int64_t h, std::int64_t kv, std::int64_t d,
           std::int64_t rel)
      : heads(h),
        kv_heads(kv),
        dim(d),
        d_rel(rel),
        tokens(bounds.back()),
        width(h * (d + rel) + 2 * kv * d),
        stride(width + 3),
        cu(std::move(bounds)),
        qkvr(random_values<std::uint16_t>(tokens * stride, 1)),
        q_norm(random_values<std::uint16_t>(d, 2)),
        k_norm(random_values<std::uint16_t>(d, 3)),
        k_conv(random_values<float>(kv * d * 4, 4)),
        v_conv(random_values<float>(kv * d * 4, 5)) {}

  PackedPrologue in(float log_floor) const {
    return {qkvr.data(),   k_conv.data(),
            v_conv.data(), q_norm.data(),
            k_norm.data(), cu.data(),
            stride,        static_cast<std::int64_t>(cu.size()) - 1,
            tokens,        heads,
            kv_heads,      dim,
            d_rel,         1e-6f,
            log_floor,     0.1f,
            DType::kBf16,  1};
  }
};

// Against attn_prologue over fresh slots, one page a sequence.
void check_prologue_packed(const Prologue& x, float log_floor) {
  const auto num_seqs = static_cast<std::int64_t>(x.cu.size()) - 1;
  const std::int64_t channels = x.kv_heads * x.dim;
  auto q = poisoned<std::uint16_t>(x.tokens * x.heads * x.dim), paged_q = q;
  auto r = poisoned<std::uint16_t>(x.tokens * x.heads * x.d_rel), paged_r = r;
  auto k = poisoned<std::uint16_t>(x.tokens * channels), v = k;
  cuda::attn_prologue_packed({x.in(log_floor), q.data(), k.data(), v.data(), r.data()},
                             host_launch());
  std::vector<std::uint16_t> pages(static_cast<std::size_t>(num_seqs * channels * 256));
  std::vector<std::uint16_t> rows(static_cast<std::size_t>(num_seqs * 3 * 2 * channels));
  std::vector<std::int32_t> table, slots;
  for (std::int32_t s = 0; s < num_seqs; ++s) {
    table.push_back(s);
    slots.push_back(s);
  }
  const std::vector<std::int64_t> start(static_cast<std::size_t>(num_seqs), 0);
  AttnPrologueParams p{};
  p.qkvr = x.qkvr.data();
  p.k_conv = x.k_conv.data();
  p.v_conv = x.v_conv.data();
  p.q_norm = x.q_norm.data();
  p.k_norm = x.k_norm.data();
  p.q = paged_q.data();
  p.r = paged_r.data();
  p.batch = {x.cu.data(), slots.data(), start.data(), nullptr, static_cast<std::int32_t>(num_seqs),
             x.tokens};
  p.pages.pages = pages.data();
  p.pages.page_stride = channels * 256;
  p.pages.head_stride = x.dim * 256;
  p.pages.table = table.data();
  p.pages.table_row_stride = 1;
  p.pages.num_kv_heads = static_cast<std::int32_t>(x.kv_heads);
  p.pages.head_dim = static_cast<std::int32_t>(x.dim);
  p.k_rows = {rows.data(), 6 * channels, 2 * channels};
  p.v_rows = {rows.data() + channels, 6 * channels, 2 * channels};
  p.qkvr_row_stride = x.stride;
  p.num_heads = x.heads;
  p.d_rel = x.d_rel;
  p.eps = 1e-6f;
  p.log_floor = log_floor;
  p.log_alpha = 0.1f;
  p.dtype = DType::kBf16;
  cuda::attn_prologue(p, host_launch());
  TML_CHECK(same_bits(q, paged_q));
  TML_CHECK(same_bits(r, paged_r));
  for (std::int64_t s = 0; s < num_seqs; ++s)
    for (std::int64_t t = x.cu[static_cast<std::size_t>(s)];
         t < x.cu[static_cast<std::size_t>(s + 1)]; ++t)
      for (std::int64_t c = 0; c < channels; ++c) {
        const std::int64_t page =
            s * channels * 256 + c / x.dim * x.dim * 256 +
            cuda::page_offset(t - x.cu[static_cast<std::size_t>(s)], c % x.dim, x.dim);
        const auto at = static_cast<std::size_t>(t * channels + c);
        TML_CHECK_EQUAL(k[at], pages[static_cast<std::size_t>(page)]);
        TML_CHECK_EQUAL(v[at], pages[static_cast<std::size_t>(page + 128 * x.dim)]);
      }
}

void check_prologue_bwd(const Prologue& x, float log_floor) {
  const std::int64_t channels = x.kv_heads * x.dim;
  const auto dq = random_values<std::uint16_t>(x.tokens * x.heads * x.dim, 11);
  const auto dk = random_values<std::uint16_t>(x.tokens * channels, 12);
  const auto dv = random_values<std::uint16_t>(x.tokens * channels, 13);
  const auto dr = random_values<std::uint16_t>(x.tokens * x.heads * x.d_rel, 14);
  std::vector<std::uint16_t> dqkvr[2], dq_norm[2], dk_norm[2];
  std::vector<float> dk_conv[2], dv_conv[2];
  for (int i = 0; i < 2; ++i) {
    dqkvr[i] = poisoned<std::uint16_t>(x.tokens * x.width);
    dq_norm[i] = dk_norm[i] = poisoned<std::uint16_t>(x.dim);
    dk_conv[i] = dv_conv[i] = poisoned<float>(channels * 4);
    const AttnProloguePackedBwdParams p{x.in(log_floor),   dq.data(),         dk.data(),
                                        dv.data(),         dr.data(),         dqkvr[i].data(),
                                        dk_conv[i].data(), dv_conv[i].data(), dq_norm[i].data(),
                                        dk_norm[i].data()};
    if (i == 0)
      with_workspace(
          cuda::attn_prologue_packed_bwd_workspace_bytes(p),
          [&](const cuda::Launch& launch) { cuda::attn_prologue_packed_bwd(p, launch); });
    else
      cpu::attn_prologue_packed_bwd(p);
  }
  TML_CHECK(same_bits(dqkvr[0], dqkvr[1]));
  TML_CHECK(same_bits(dk_conv[0], dk_conv[1]));
  TML_CHECK(same_bits(dv_conv[0], dv_conv[1]));
  TML_CHECK(same_bits(dq_norm[0], dq_norm[1]));
  TML_CHECK(same_bits(dk_norm[0], dk_norm[1]));
}

TML_TEST(cuda_attn_prologue_packed_is_what_serving_does) {
  check_prologue_packed(Prologue({0, 0, 1, 4, 19}, 4, 2, 64, 8), 5.0f);
  check_prologue_packed(Prologue({0, 6}, 3, 1, 128, 5), 0.0f);
}

TML_TEST(cuda_attn_prologue_packed_bwd_is_the_op) {
  check_prologue_bwd(Prologue({0, 0, 1, 4, 19}, 4, 2, 64, 16), 5.0f);
  check_prologue_bwd(Prologue({0, 6}, 3, 1, 128, 5), 0.0f);
  check_prologue_bwd(Prologue({0, 510, 515, 530}, 1, 1, 16, 4), 100.0f);
}

TML_TEST(cuda_gradients_refuse_a_small_workspace) {
  RmsNormBwdParams p{};
  p.num_rows = 4;
  p.dim = 16;
  p.dtype = DType::kF32;
  bool is_refused = false;
  try {
    cuda::rms_norm_bwd(p, host_launch());
  } catch (const std::invalid_argument& error) {
    is_refused = std::string(error.what()).find("rms_norm_bwd: workspace must be at least") == 0;
  }
  TML_CHECK(is_refused);
}

}  // namespace
}  // namespace tml::tests
