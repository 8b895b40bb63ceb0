// attn_prologue: a thread takes a run of (token, query head) and a run of (piece, K or V, KV head).
// Pieces end on pages, so the two keys of a V pair are one thread's. Up to sixteen keys of a head
// are gathered in L1, then written to the page transposed: K k-steps of neighbouring keys are
// neighbours there, and a run of sixteen is one cache line.
#include "ops/attn_prologue.h"

#include "core/memory.h"
#include "cpu/cpu.h"
#include "cpu/log_tau.h"
#include "cpu/panel.h"
#include "cpu/row_norm.h"
#include "cpu/short_conv.h"
#include "cpu/step_pieces.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

constexpr std::int64_t kPageLen = contract::kPageLen;
constexpr std::int64_t kGroup = 16;
// Below this many elements a second thread costs more than it saves.
constexpr std::int64_t kMinParallelElements = 48 << 10;

// keys [count, head_dim] -> column i of a K block whose first column is `block`.
template <class T>
void write_k(const T* keys, std::int64_t count, std::int64_t head_dim, KStep* block) {
  constexpr std::int64_t kPerStep = 4 / sizeof(T);
  for (std::int64_t step = 0; step < head_dim / kPerStep; ++step)
    for (std::int64_t i = 0; i < count; ++i)
      std::memcpy(block + step * kPageLen + i, keys + i * head_dim + step * kPerStep, 4);
}

// values [count, head_dim] -> keys [first, first + count) of a V block.
[[maybe_unused]] void write_v(const float* values, std::int64_t first, std::int64_t count,
                              std::int64_t head_dim, KStep* block) {
  std::memcpy(block + first * head_dim, values,
              static_cast<std::size_t>(count * head_dim) * sizeof(float));
}
void write_v(const std::uint16_t* values, std::int64_t first, std::int64_t count,
             std::int64_t head_dim, KStep* block) {
  for (std::int64_t i = 0; i < count;) {
    KStep* pair = block + (first + i) / 2 * head_dim;
    const std::uint16_t* value = values + i * head_dim;
    if ((first + i) % 2 != 0) {
      for (std::int64_t d = 0; d < head_dim; ++d)
        pair[d] = (pair[d] & 0xffffu) | static_cast<KStep>(value[d]) << 16;
      i += 1;
    } else if (i + 1 < count) {
      for (std::int64_t d = 0; d < head_dim; ++d)
        pair[d] = value[d] | static_cast<KStep>(value[head_dim + d]) << 16;
      i += 2;
    } else {
      for (std::int64_t d = 0; d < head_dim; ++d) pair[d] = value[d];
      i += 1;
    }
  }
}

// K or V of one head for the tokens of one piece.
template <class T>
void write_piece(const AttnPrologueParams& p, const ConvInput<T>& input, const Piece& piece,
                 bool is_v, std::int64_t head) {
  const std::int64_t dim = p.pages.head_dim;
  const float* conv = (is_v ? p.v_conv : p.k_conv) + head * dim * contract::kConvTaps;
  auto* rows = static_cast<T*>(
      scratch(Scratch::kThread, static_cast<std::size_t>(kGroup * dim) * sizeof(T)));
  const std::int32_t* table = p.pages.table + p.batch.slots[piece.seq] * p.pages.table_row_stride;
  for (std::int64_t done = 0; done < piece.count;) {
    const std::int64_t offset = piece.offset + done;
    const std::int64_t pos = p.batch.start_pos[piece.seq] + offset;
    const std::int64_t to_edge = kGroup - pos % kGroup;
    const std::int64_t count = piece.count - done < to_edge ? piece.count - done : to_edge;
    Vec squares[kGroup];
    for (Vec& s : squares) s = zero();
    for (std::int64_t channel = 0; channel < dim; channel += 16)
      input.convolve(channel, conv, offset, count, [&](std::int64_t i, Vec y) {
        store_rounded(rows + i * dim + channel, y);
        squares[i] = fma(y, y, squares[i]);
      });
    T* block = static_cast<T*>(p.pages.pages) + table[pos / kPageLen] * p.pages.page_stride +
               head * p.pages.head_stride;
    const std::int64_t key = pos % kPageLen;
    if (is_v) {
      write_v(rows, key, count, dim, reinterpret_cast<KStep*>(block + kPageLen * dim));
    } else {
      for (std::int64_t i = 0; i < count; ++i)
        scale_row(rows + i * dim, static_cast<const T*>(p.k_norm), rows + i * dim, dim,
                  rstd_of(squares[i], dim, p.eps));
      write_k(rows, count, dim, reinterpret_cast<KStep*>(block) + key);
    }
    done += count;
  }
}

// Q and R of (token, head) units [units.begin, units.end), heads within tokens.
template <class T>
void write_queries(const AttnPrologueParams& p, Range units) {
  const std::int64_t dim = p.pages.head_dim;
  const std::int64_t r_begin = (p.num_heads + 2 * p.pages.num_kv_heads) * dim;
  for (std::int64_t s = 0; s < p.batch.num_seqs; ++s) {
    const std::int64_t seq_begin = p.batch.cu_tokens[s] * p.num_heads;
    const std::int64_t seq_end = p.batch.cu_tokens[s + 1] * p.num_heads;
    const std::int64_t last = seq_end < units.end ? seq_end : units.end;
    for (std::int64_t unit = seq_begin > units.begin ? seq_begin : units.begin; unit < last;
         ++unit) {
      const std::int64_t token = unit / p.num_heads, head = unit % p.num_heads;
      const T* row = static_cast<const T*>(p.qkvr) + token * p.qkvr_row_stride;
      T* q = static_cast<T*>(p.q) + unit * dim;
      T* r = static_cast<T*>(p.r) + unit * p.d_rel;
      const T* r_in = row + r_begin + head * p.d_rel;
      rms_norm_row(row + head * dim, static_cast<const T*>(p.q_norm), q, dim, p.eps);
      if (p.log_floor > 0.0f) {
        const std::int64_t pos = p.batch.start_pos[s] + token - p.batch.cu_tokens[s];
        const float tau = log_tau(pos, p.log_floor, p.log_alpha);
        const auto scale = [&](Vec v, Vec) { return mul(v, set1(tau)); };
        map_row(q, q, q, dim, scale);
        map_row(r_in, r_in, r, p.d_rel, scale);
      } else {
        std::memcpy(r, r_in, static_cast<std::size_t>(p.d_rel) * sizeof(T));
      }
    }
  }
}

template <class T>
void attn_prologue_typed(const AttnPrologueParams& p) {
  const std::int64_t dim = p.pages.head_dim;
  const std::int64_t kv_heads = p.pages.num_kv_heads;
  const std::int64_t per_piece = 2 * kv_heads;
  const auto origin = [&](std::int64_t s) { return p.batch.start_pos[s]; };
  const StepPieces pieces(p.batch, kPageLen, origin);
  const std::int64_t row_width = (p.num_heads + per_piece) * dim;
  const bool is_small = p.batch.num_tokens * row_width < kMinParallelElements;
  parallel(is_small ? 1 : p.num_threads, [&](int thread, int num_threads) {
    write_queries<T>(p, split(p.batch.num_tokens * p.num_heads, thread, num_threads));
    const Range units = split(pieces.count() * per_piece, thread, num_threads);
    const Range own{units.begin / per_piece, ceil_div(units.end, per_piece)};
    pieces.each(own, [&](std::int64_t id, const Piece& piece) {
      const std::int64_t first = units.begin - id * per_piece;
      const std::int64_t last = units.end - id * per_piece;
      for (std::int64_t part = first > 0 ? first : 0; part < last && part < per_piece; ++part) {
        const ConvRows& state = part < kv_heads ? p.k_rows : p.v_rows;
        const std::int64_t head = part % kv_heads;
        const ConvInput<T> input{
            static_cast<const T*>(p.qkvr) + p.batch.cu_tokens[piece.seq] * p.qkvr_row_stride +
                (p.num_heads + part) * dim,
            p.qkvr_row_stride,
            static_cast<T*>(state.rows) + p.batch.slots[piece.seq] * state.slot_stride + head * dim,
            state.row_stride};
        write_piece(p, input, piece, part >= kv_heads, head);
        if (piece.offset == 0)
          input.advance(p.batch.cu_tokens[piece.seq + 1] - p.batch.cu_tokens[piece.seq], dim);
      }
    });
  });
}

}  // namespace

void attn_prologue(const AttnPrologueParams& p) {
  if (p.batch.num_tokens == 0) return;
  if (p.dtype == DType::kF32) return TML_F32(attn_prologue, attn_prologue_typed<float>)(p);
  attn_prologue_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
