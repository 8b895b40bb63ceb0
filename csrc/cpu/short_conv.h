// The depthwise causal convolution of width 4 and its state: x[t] + sum over taps of w * x[t - 3 ..
// t], shared by attn_prologue and sconv_norm. Sixteen channels at a time, tokens in order, so each
// input is loaded once and the three before it stay in registers.
#pragma once

#include "core/contract.h"
#include "cpu/vec.h"
#include "ops/step_batch.h"

namespace tml::cpu::TML_ISA_NS {

inline constexpr int kHistory = contract::kConvTaps - 1;

struct Taps {
  Vec w[contract::kConvTaps];  // oldest first
};

// The taps of sixteen channels, from [16][4].
TML_INLINE Taps load_taps(const float* w) {
#if TML_ISA_LEVEL >= 2
  const __m512i even = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(2));
  const __m512 a = load(w).v, b = load(w + 16).v, c = load(w + 32).v, d = load(w + 48).v;
  const __m512 low01 = _mm512_permutex2var_ps(a, even, b);
  const __m512 low23 = _mm512_permutex2var_ps(a, odd, b);
  const __m512 high01 = _mm512_permutex2var_ps(c, even, d);
  const __m512 high23 = _mm512_permutex2var_ps(c, odd, d);
  return {{{_mm512_shuffle_f32x4(low01, high01, 0x44)},
           {_mm512_shuffle_f32x4(low01, high01, 0xee)},
           {_mm512_shuffle_f32x4(low23, high23, 0x44)},
           {_mm512_shuffle_f32x4(low23, high23, 0xee)}}};
#else
  alignas(64) float columns[contract::kConvTaps][16];
  for (int i = 0; i < 16; ++i)
    for (int tap = 0; tap < contract::kConvTaps; ++tap)
      columns[tap][i] = w[i * contract::kConvTaps + tap];
  return {{load(columns[0]), load(columns[1]), load(columns[2]), load(columns[3])}};
#endif
}

// One sequence's inputs of the step, preceded by its state. Channels are counted from `x`.
template <class T>
struct ConvInput {
  const T* x;  // first new token
  std::int64_t x_row_stride;
  T* state;  // oldest of the three rows
  std::int64_t state_row_stride;

  // The input `offset` tokens after the first new one; -3 to -1 are the state.
  TML_INLINE const T* row(std::int64_t offset) const {
    return offset >= 0 ? x + offset * x_row_stride : state + (kHistory + offset) * state_row_stride;
  }

  // emit(i, round(x + conv(x))) for tokens offset + i, i < count, channels [channel, channel + 16).
  template <class Emit>
  TML_INLINE void convolve(std::int64_t channel, const float* weight, std::int64_t offset,
                           std::int64_t count, const Emit& emit) const {
    const Taps taps = load_taps(weight + channel * contract::kConvTaps);
    Vec x3 = load_as_f32(row(offset - 3) + channel);
    Vec x2 = load_as_f32(row(offset - 2) + channel);
    Vec x1 = load_as_f32(row(offset - 1) + channel);
    const T* input = x + offset * x_row_stride + channel;
    for (std::int64_t i = 0; i < count; ++i) {
      const Vec x0 = load_as_f32(input + i * x_row_stride);
      Vec acc = fma(taps.w[0], x3, zero());
      acc = fma(taps.w[1], x2, acc);
      acc = fma(taps.w[2], x1, acc);
      acc = fma(taps.w[3], x0, acc);
      emit(i, round_through<T>(add(acc, x0)));
      x3 = x2;
      x2 = x1;
      x1 = x0;
    }
  }

  // The state becomes the last three of (state, new inputs).
  TML_INLINE void advance(std::int64_t num_tokens, std::int64_t num_channels) const {
    for (std::int64_t i = 0; i < kHistory; ++i) {
      T* target = state + i * state_row_stride;
      const T* source = row(num_tokens - kHistory + i);  // oldest first: never one overwritten
      std::memcpy(target, source, static_cast<std::size_t>(num_channels) * sizeof(T));
    }
  }
};

}  // namespace tml::cpu::TML_ISA_NS
