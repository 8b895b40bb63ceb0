// A ragged step on the device: which sequence a token belongs to, and the short convolution with
// its state. The block (or warp) that takes a sequence's first token takes all of the first three,
// whose convolution reads the state, and then advances the state: nobody else looks at it.
#pragma once

#include "cuda/row.h"
#include "ops/step_batch.h"

namespace tml::cuda {

inline constexpr int kHistory = contract::kConvTaps - 1;

// The last sequence whose first token is at or before `token` (empty ones are passed over).
TML_HOST_DEVICE std::int32_t sequence_of(const std::int32_t* cu_tokens, std::int32_t num_seqs,
                                         std::int64_t token) {
  std::int32_t low = 0, high = num_seqs - 1;
  while (low < high) {
    const std::int32_t middle = (low + high + 1) / 2;
    if (cu_tokens[middle] <= token)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// What the worker of `token` does: tokens [offset, offset + count) of sequence seq; count 0:
// nothing.
struct StepShare {
  std::int32_t seq;
  std::int64_t offset, count, seq_tokens;
};
TML_HOST_DEVICE StepShare share_of(const StepBatch& batch, std::int64_t token) {
  const std::int32_t seq = sequence_of(batch.cu_tokens, batch.num_seqs, token);
  const std::int64_t begin = batch.cu_tokens[seq], count = batch.cu_tokens[seq + 1] - begin;
  const std::int64_t offset = token - begin;
  if (offset == 0) return {seq, 0, count < kHistory ? count : kHistory, count};
  return {seq, offset, offset < kHistory ? 0 : 1, count};
}

// One sequence's inputs of the step, preceded by its state; channels are counted from x.
template <class T>
struct ConvInput {
  const T* x;
  std::int64_t x_row_stride;
  T* state;
  std::int64_t state_row_stride;

  // The input `offset` tokens after the first new one; -3 to -1 are the state.
  TML_DEVICE const T* row(std::int64_t offset) const {
    return offset >= 0 ? x + offset * x_row_stride : state + (kHistory + offset) * state_row_stride;
  }
};

// round(x + conv(x)) from the inputs oldest first: fma over the taps from 0, then x is added.
template <class T>
TML_DEVICE float convolved(const float (&taps)[4], float x3, float x2, float x1, float x0) {
  float acc = __fmaf_rn(taps[0], x3, 0.0f);
  acc = __fmaf_rn(taps[1], x2, acc);
  acc = __fmaf_rn(taps[2], x1, acc);
  acc = __fmaf_rn(taps[3], x0, acc);
  return round_as<T>(__fadd_rn(acc, x0));
}

// The state of eight channels becomes the last three of (state, new inputs). Read whole before any
// is written.
template <class T>
TML_DEVICE void advance_state(const ConvInput<T>& input, std::int64_t channel, std::int64_t count,
                              std::int64_t seq_tokens, bool is_aligned) {
  float rows[kHistory][8];
#pragma unroll
  for (int i = 0; i < kHistory; ++i)
    load_eight(rows[i], input.row(seq_tokens - kHistory + i) + channel, count, is_aligned);
#pragma unroll
  for (int i = 0; i < kHistory; ++i)
    store_eight(input.state + i * input.state_row_stride + channel, rows[i], count, is_aligned);
}

}  // namespace tml::cuda
