// attn_prologue_packed: a thread owns pieces of sixteen tokens, every head of them.
#include "cpu/cpu.h"
#include "cpu/log_tau.h"
#include "cpu/packed_prologue.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

template <class T>
void write_query(const AttnProloguePackedParams& p, const PrologueWidths& at, std::int64_t token,
                 std::int64_t position, std::int64_t head) {
  const std::int64_t dim = p.in.head_dim, d_rel = p.in.d_rel;
  const T* row = static_cast<const T*>(p.in.qkvr) + token * p.in.qkvr_row_stride;
  const T* r_in = row + at.r + head * d_rel;
  T* q = static_cast<T*>(p.q) + (token * p.in.num_heads + head) * dim;
  T* r = static_cast<T*>(p.r) + (token * p.in.num_heads + head) * d_rel;
  rms_norm_row(row + head * dim, static_cast<const T*>(p.in.q_norm), q, dim, p.in.eps);
  if (p.in.log_floor > 0.0f) {
    const Vec tau = set1(log_tau(position, p.in.log_floor, p.in.log_alpha));
    const auto scale = [&](Vec v, Vec) { return mul(v, tau); };
    map_row(q, q, q, dim, scale);
    map_row(r_in, r_in, r, d_rel, scale);
  } else {
    std::memcpy(r, r_in, static_cast<std::size_t>(d_rel) * sizeof(T));
  }
}

template <class T>
void attn_prologue_packed_typed(const AttnProloguePackedParams& p) {
  const std::int64_t dim = p.in.head_dim;
  const PrologueWidths at(p.in);
  const StepBatch batch = batch_of(p.in);
  const auto origin = [](std::int64_t) { return std::int64_t{0}; };
  const StepPieces pieces(batch, kProloguePiece, origin);
  const bool is_small = p.in.num_tokens * at.row < kMinPrologueElements;
  parallel(is_small ? 1 : p.in.num_threads, [&](int thread, int num_threads) {
    T* state = zero_state<T>(dim);
    pieces.each(split(pieces.count(), thread, num_threads), [&](std::int64_t, const Piece& piece) {
      const std::int64_t first = p.in.cu_tokens[piece.seq] + piece.offset;
      for (std::int64_t i = 0; i < piece.count; ++i)
        for (std::int64_t head = 0; head < p.in.num_heads; ++head)
          write_query<T>(p, at, first + i, piece.offset + i, head);
      for (std::int64_t head = 0; head < p.in.num_kv_heads; ++head) {
        const std::int64_t channel = head * dim;
        T* k = static_cast<T*>(p.k) + first * at.channels + channel;
        T* v = static_cast<T*>(p.v) + first * at.channels + channel;
        Vec squares[kProloguePiece];
        convolve_head(p.in, piece, state, at.v + channel,
                      p.in.v_conv + channel * contract::kConvTaps, v, at.channels, squares);
        convolve_head(p.in, piece, state, at.k + channel,
                      p.in.k_conv + channel * contract::kConvTaps, k, at.channels, squares);
        for (std::int64_t i = 0; i < piece.count; ++i)
          scale_row(k + i * at.channels, static_cast<const T*>(p.in.k_norm), k + i * at.channels,
                    dim, rstd_of(squares[i], dim, p.in.eps));
      }
    });
  });
}

}  // namespace

void attn_prologue_packed(const AttnProloguePackedParams& p) {
  if (p.in.num_tokens == 0) return;
  if (p.in.dtype == DType::kF32)
    return TML_F32(attn_prologue_packed, attn_prologue_packed_typed<float>)(p);
  attn_prologue_packed_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
