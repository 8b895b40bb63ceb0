// attn_prologue_packed_bwd: pieces of sixteen tokens per thread give the gradients of q, r and of
// the convolved k; then runs of rows go back through the convolutions, and whole columns give the
// parameters.
#include "cpu/arena.h"
#include "cpu/cpu.h"
#include "cpu/log_tau.h"
#include "cpu/norm_bwd.h"
#include "cpu/packed_prologue.h"
#include "cpu/short_conv_bwd.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

template <class T>
struct Workspace {
  Neighbours* near;  // [num_tokens]
  float* tau;        // [num_tokens]
  float* q_rstd;     // [num_tokens, num_heads]
  float* k_rstd;     // [num_tokens, num_kv_heads]
  T* k;              // [num_tokens, channels] convolved, before the norm
  T* dk;             // [num_tokens, channels] its gradient
};

template <class T>
void query_grad(const AttnProloguePackedBwdParams& p, const PrologueWidths& at,
                const Workspace<T>& work, std::int64_t token, std::int64_t head) {
  const std::int64_t dim = p.in.head_dim, d_rel = p.in.d_rel;
  const std::int64_t unit = token * p.in.num_heads + head;
  const T* q = static_cast<const T*>(p.in.qkvr) + token * p.in.qkvr_row_stride + head * dim;
  const T* dq = static_cast<const T*>(p.dq) + unit * dim;
  const T* dr = static_cast<const T*>(p.dr) + unit * d_rel;
  T* out = static_cast<T*>(p.dqkvr) + token * at.row;
  const Vec tau = set1(work.tau[token]);
  const auto upstream = [&](std::int64_t i, int, Vec, Vec) {
    return mul(load_as_f32(dq + i), tau);
  };
  const auto* weight = static_cast<const T*>(p.in.q_norm);
  const NormRow stats = norm_row(q, weight, dim, p.in.eps, upstream);
  work.q_rstd[unit] = stats.rstd;
  norm_row_dx(q, weight, dim, stats, upstream,
              [&](std::int64_t i, int, Vec value) { store_rounded(out + head * dim + i, value); });
  map_row(dr, dr, out + at.r + head * d_rel, d_rel, [&](Vec v, Vec) { return mul(v, tau); });
}

template <class T>
void key_grads(const AttnProloguePackedBwdParams& p, const PrologueWidths& at,
               const Workspace<T>& work, const Piece& piece, T* state, std::int64_t head) {
  const std::int64_t dim = p.in.head_dim, channel = head * dim;
  const std::int64_t first = p.in.cu_tokens[piece.seq] + piece.offset;
  Vec squares[kProloguePiece];
  convolve_head(p.in, piece, state, at.k + channel, p.in.k_conv + channel * contract::kConvTaps,
                work.k + first * at.channels + channel, at.channels, squares);
  for (std::int64_t t = first; t < first + piece.count; ++t) {
    const T* k = work.k + t * at.channels + channel;
    const T* dk = static_cast<const T*>(p.dk) + t * at.channels + channel;
    const auto upstream = [&](std::int64_t i, int, Vec, Vec) { return load_as_f32(dk + i); };
    const auto* weight = static_cast<const T*>(p.in.k_norm);
    const NormRow stats = norm_row(k, weight, dim, p.in.eps, upstream);
    work.k_rstd[t * p.in.num_kv_heads + head] = stats.rstd;
    norm_row_dx(k, weight, dim, stats, upstream, [&](std::int64_t i, int, Vec value) {
      store_rounded(work.dk + t * at.channels + channel + i, value);
    });
  }
}

// dnorm of the columns in `groups`; e(token, head, column) is the gradient of the weighted value
// and x(token, head) the row that was normalised.
template <class T, class Upstream, class Row>
void norm_columns(Range groups, std::int64_t num_tokens, std::int64_t num_heads, const float* rstd,
                  const Upstream& e, const Row& x, T* dnorm) {
  grad_columns<1>(
      groups, num_tokens,
      [&](std::int64_t t, std::int64_t group, Vec(&sum)[1]) {
        for (std::int64_t head = 0; head < num_heads; ++head) {
          const Vec v = load_as_f32(x(t, head) + group * 16);
          sum[0] =
              fma(e(t, head, group * 16), normed_part<T>(v, rstd[t * num_heads + head]), sum[0]);
        }
      },
      [&](std::int64_t group, const Vec(&total)[1]) {
        store_rounded(dnorm + group * 16, total[0]);
      });
}

template <class T>
void attn_prologue_packed_bwd_typed(const AttnProloguePackedBwdParams& p) {
  const std::int64_t dim = p.in.head_dim, num_tokens = p.in.num_tokens;
  const std::int64_t num_heads = p.in.num_heads, kv_heads = p.in.num_kv_heads;
  const PrologueWidths at(p.in);
  Workspace<T> work;
  Arena arena(Scratch::kOp);
  arena.take(&work.near, num_tokens)
      .take(&work.tau, num_tokens)
      .take(&work.q_rstd, num_tokens * num_heads)
      .take(&work.k_rstd, num_tokens * kv_heads)
      .take(&work.k, num_tokens * at.channels)
      .take(&work.dk, num_tokens * at.channels)
      .commit();
  fill_neighbours(p.in.cu_tokens, p.in.num_seqs, work.near);
  for (std::int64_t s = 0; s < p.in.num_seqs; ++s)
    for (std::int64_t t = p.in.cu_tokens[s]; t < p.in.cu_tokens[s + 1]; ++t)
      work.tau[t] = p.in.log_floor > 0.0f
                        ? log_tau(t - p.in.cu_tokens[s], p.in.log_floor, p.in.log_alpha)
                        : 1.0f;
  const auto* qkvr = static_cast<const T*>(p.in.qkvr);
  const auto* dq = static_cast<const T*>(p.dq);
  const auto* dk = static_cast<const T*>(p.dk);
  const auto* dv = static_cast<const T*>(p.dv);
  auto* dqkvr = static_cast<T*>(p.dqkvr);
  const ConvGrad<T> k_conv{work.dk,     at.channels, qkvr + at.k, p.in.qkvr_row_stride,
                           p.in.k_conv, work.near,   at.channels};
  const ConvGrad<T> v_conv{dv,          at.channels, qkvr + at.v, p.in.qkvr_row_stride,
                           p.in.v_conv, work.near,   at.channels};
  const StepBatch batch = batch_of(p.in);
  const auto origin = [](std::int64_t) { return std::int64_t{0}; };
  const StepPieces pieces(batch, kProloguePiece, origin);
  const bool is_small = num_tokens * at.row < kMinPrologueElements;
  parallel(is_small ? 1 : p.in.num_threads, [&](int thread, int num_threads) {
    T* state = zero_state<T>(dim);
    pieces.each(split(pieces.count(), thread, num_threads), [&](std::int64_t, const Piece& piece) {
      const std::int64_t first = p.in.cu_tokens[piece.seq] + piece.offset;
      for (std::int64_t t = first; t < first + piece.count; ++t)
        for (std::int64_t head = 0; head < num_heads; ++head) query_grad(p, at, work, t, head);
      for (std::int64_t head = 0; head < kv_heads; ++head)
        key_grads(p, at, work, piece, state, head);
    });
    team_barrier();
    const Range tokens = split(num_tokens, thread, num_threads);
    k_conv.input(tokens, dqkvr + at.k, at.row);
    v_conv.input(tokens, dqkvr + at.v, at.row);
    const Range groups = split(at.channels / 16, thread, num_threads);
    k_conv.taps(groups, num_tokens, p.dk_conv);
    v_conv.taps(groups, num_tokens, p.dv_conv);
    const Range head_groups = split(dim / 16, thread, num_threads);
    norm_columns(
        head_groups, num_tokens, num_heads, work.q_rstd,
        [&](std::int64_t t, std::int64_t head, std::int64_t column) {
          return mul(load_as_f32(dq + (t * num_heads + head) * dim + column), set1(work.tau[t]));
        },
        [&](std::int64_t t, std::int64_t head) {
          return qkvr + t * p.in.qkvr_row_stride + head * dim;
        },
        static_cast<T*>(p.dq_norm));
    norm_columns(
        head_groups, num_tokens, kv_heads, work.k_rstd,
        [&](std::int64_t t, std::int64_t head, std::int64_t column) {
          return load_as_f32(dk + t * at.channels + head * dim + column);
        },
        [&](std::int64_t t, std::int64_t head) {
          return static_cast<const T*>(work.k) + t * at.channels + head * dim;
        },
        static_cast<T*>(p.dk_norm));
  });
}

}  // namespace

void attn_prologue_packed_bwd(const AttnProloguePackedBwdParams& p) {
  if (p.in.dtype == DType::kF32)
    return TML_F32(attn_prologue_packed_bwd, attn_prologue_packed_bwd_typed<float>)(p);
  attn_prologue_packed_bwd_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
