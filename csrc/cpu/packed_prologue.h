// What attn_prologue_packed and its gradient share: views of the merged projection, and the
// convolved rows of one head over a piece of a sequence.
#pragma once

#include "core/memory.h"
#include "cpu/row_norm.h"
#include "cpu/short_conv.h"
#include "cpu/step_pieces.h"
#include "ops/attn_prologue_packed.h"

namespace tml::cpu::TML_ISA_NS {

inline constexpr int kProloguePiece = 16;
// Below this many elements a second thread costs more than it saves.
inline constexpr std::int64_t kMinPrologueElements = 48 << 10;

struct PrologueWidths {
  explicit PrologueWidths(const PackedPrologue& p)
      : channels(p.num_kv_heads * p.head_dim),
        k(p.num_heads * p.head_dim),
        v(k + channels),
        r(v + channels),
        row(r + p.num_heads * p.d_rel) {}
  std::int64_t channels;      // of K, and of V
  std::int64_t k, v, r, row;  // where k, v, r and the next row begin
};

TML_INLINE StepBatch batch_of(const PackedPrologue& p) {
  StepBatch batch{};
  batch.cu_tokens = p.cu_tokens;
  batch.num_seqs = static_cast<std::int32_t>(p.num_seqs);
  batch.num_tokens = p.num_tokens;
  return batch;
}

// A row of zeros in the thread's scratch: the state before every sequence.
template <class T>
T* zero_state(std::int64_t head_dim) {
  const auto num_bytes = static_cast<std::size_t>(head_dim) * sizeof(T);
  void* state = scratch(Scratch::kThread, num_bytes);
  std::memset(state, 0, num_bytes);
  return static_cast<T*>(state);
}

// out[i] = round(x + conv(x)) of one head, rows out_row_stride apart; squares[i] gathers its norm.
// `begin` is the head's first channel in a row of qkvr, `conv` its taps.
template <class T>
TML_INLINE void convolve_head(const PackedPrologue& p, const Piece& piece, T* state,
                              std::int64_t begin, const float* conv, T* out,
                              std::int64_t out_row_stride, Vec (&squares)[kProloguePiece]) {
  const ConvInput<T> input{
      static_cast<const T*>(p.qkvr) + p.cu_tokens[piece.seq] * p.qkvr_row_stride + begin,
      p.qkvr_row_stride, state, 0};
  for (Vec& s : squares) s = zero();
  for (std::int64_t channel = 0; channel < p.head_dim; channel += 16)
    input.convolve(channel, conv, piece.offset, piece.count, [&](std::int64_t i, Vec y) {
      store_rounded(out + i * out_row_stride + channel, y);
      squares[i] = fma(y, y, squares[i]);
    });
}

}  // namespace tml::cpu::TML_ISA_NS
