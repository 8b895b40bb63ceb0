// The gradients of y = x + conv(x) over packed sequences (contract: ops/sconv_norm_bwd.h), shared
// by sconv_norm_bwd and attn_prologue_packed_bwd.
#pragma once

#include "cpu/grad_columns.h"
#include "cpu/short_conv.h"

namespace tml::cpu::TML_ISA_NS {

// How many of the tokens before and after a token its convolution shares a sequence with: at
// most 3.
struct Neighbours {
  std::uint8_t before, after;
};

TML_INLINE void fill_neighbours(const std::int32_t* cu_tokens, std::int64_t num_seqs,
                                Neighbours* out) {
  for (std::int64_t s = 0; s < num_seqs; ++s)
    for (std::int64_t t = cu_tokens[s]; t < cu_tokens[s + 1]; ++t) {
      const std::int64_t before = t - cu_tokens[s], after = cu_tokens[s + 1] - 1 - t;
      out[t] = {static_cast<std::uint8_t>(std::min<std::int64_t>(before, kHistory)),
                static_cast<std::uint8_t>(std::min<std::int64_t>(after, kHistory))};
    }
}

template <class T>
struct ConvGrad {
  const T* g;  // the gradient of y: [num_tokens, num_channels]
  std::int64_t g_row_stride;
  const T* x;  // [num_tokens, num_channels]
  std::int64_t x_row_stride;
  const float* weight;  // [num_channels, 4]
  const Neighbours* near;
  std::int64_t num_channels;  // a multiple of 16

  TML_INLINE Vec g_at(std::int64_t token, std::int64_t channel) const {
    return load_as_f32(g + token * g_row_stride + channel);
  }
  TML_INLINE Vec x_at(std::int64_t token, std::int64_t channel) const {
    return load_as_f32(x + token * x_row_stride + channel);
  }

  // dx of `tokens`, rounded; sixteen channels of a run at a time, tokens backwards.
  void input(Range tokens, T* dx, std::int64_t dx_row_stride) const {
    constexpr std::int64_t kRunLen = 16;
    for (std::int64_t end = tokens.end; end > tokens.begin; end -= kRunLen) {
      const std::int64_t begin = std::max(tokens.begin, end - kRunLen);
      const int after = near[end - 1].after;
      for (std::int64_t channel = 0; channel < num_channels; channel += 16) {
        const Taps taps = load_taps(weight + channel * contract::kConvTaps);
        Vec g1 = after >= 1 ? g_at(end, channel) : zero();
        Vec g2 = after >= 2 ? g_at(end + 1, channel) : zero();
        Vec g3 = after >= 3 ? g_at(end + 2, channel) : zero();
        for (std::int64_t t = end - 1; t >= begin; --t) {
          if (near[t].after == 0) g1 = g2 = g3 = zero();
          const Vec g0 = g_at(t, channel);
          Vec acc = fma(taps.w[3], g0, zero());
          acc = fma(taps.w[2], g1, acc);
          acc = fma(taps.w[1], g2, acc);
          acc = fma(taps.w[0], g3, acc);
          store_rounded(dx + t * dx_row_stride + channel, add(acc, g0));
          g3 = g2;
          g2 = g1;
          g1 = g0;
        }
      }
    }
  }

  // dweight [num_channels, 4] of the channels in `groups`.
  void taps(Range groups, std::int64_t num_tokens, float* dweight) const {
    grad_columns<contract::kConvTaps>(
        groups, num_tokens,
        [&](std::int64_t t, std::int64_t group, Vec(&sums)[contract::kConvTaps]) {
          const std::int64_t channel = group * 16;
          const Vec g0 = g_at(t, channel);
          for (int back = 0; back <= near[t].before; ++back)
            sums[kHistory - back] = fma(g0, x_at(t - back, channel), sums[kHistory - back]);
        },
        [&](std::int64_t group, const Vec(&totals)[contract::kConvTaps]) {
          alignas(64) float columns[contract::kConvTaps][16];
          for (int tap = 0; tap < contract::kConvTaps; ++tap) store(columns[tap], totals[tap]);
          for (int i = 0; i < 16; ++i)
            for (int tap = 0; tap < contract::kConvTaps; ++tap)
              dweight[(group * 16 + i) * contract::kConvTaps + tap] = columns[tap][i];
        });
  }
};

}  // namespace tml::cpu::TML_ISA_NS
