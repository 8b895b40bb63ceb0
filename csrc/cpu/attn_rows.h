// The products of attention: query rows against a page of keys, probabilities against a page of
// values. Rows are kRowSteps k-steps apart, a constant, so that the broadcasts of a tile share one
// address register and neither q nor p is ever transposed.
#pragma once

#include "cpu/panel_rows.h"

namespace tml::cpu::TML_ISA_NS {

// 128 k-steps (head_dim of fp32, keys of a unit) and one cache line more: neighbouring rows start
// in different sets of the L1 cache.
inline constexpr std::ptrdiff_t kRowSteps = 144;

// Rows whose accumulators fit the 32 registers beside kVecs vectors of weights and a broadcast; on
// AVX-512 without BF16 both come as an even and an odd half. Without AVX-512 the runs are narrow.
inline constexpr int kMaxVecs = TML_ISA_LEVEL >= 2 ? 8 : TML_ISA_LEVEL + 1;
inline constexpr int kWeightRegisters = TML_ISA_LEVEL == 2 ? 2 : 1;
template <int kVecs>
inline constexpr int kRowsBeside =
    kVecs > kMaxVecs ? 0 : tile_size((32 - kWeightRegisters) / kVecs - kWeightRegisters);

template <int kVecs>
struct Width {
  static constexpr int value = kVecs;
};

// The two blocks this thread reads next, null if there are none: requested line by line, evenly,
// while a product runs. A core drops requests beyond the few it can have under way, so where memory
// is the bottleneck (kAskTwiceRows or less) the second block is requested too, and again once it
// has become the first.
inline constexpr int kAskTwiceRows = 8;
struct Ahead {
  const void* first = nullptr;
  const void* second = nullptr;
  std::int64_t num_bytes = 0;  // of each
};

class Requests {
 public:
  Requests(const Ahead& ahead, const void* fallback, std::int64_t num_lines) {
    const bool has_first = ahead.first != nullptr && num_lines > 0;
    const bool has_second = has_first && ahead.second != nullptr;
    first_ = static_cast<const char*>(has_first ? ahead.first : fallback);
    second_ = static_cast<const char*>(has_second ? ahead.second : first_);
    step_ = has_first ? ahead.num_bytes / num_lines : 0;
  }
  template <int kLines, bool kBoth>
  TML_INLINE void advance() {
#pragma GCC unroll 8
    for (int line = 0; line < kLines; ++line) {
      prefetch_l2(first_ + line * step_);
      if constexpr (kBoth) prefetch_l2(second_ + line * step_);
    }
    first_ += kLines * step_;
    if constexpr (kBoth) second_ += kLines * step_;
  }

 private:
  const char *first_, *second_;
  std::ptrdiff_t step_;  // bytes from one request to the next
};

TML_INLINE KStep read_step(const KStep* p) {
  KStep step;  // a row holds fp32 or pairs of bf16
  std::memcpy(&step, p, sizeof(step));
  return step;
}

template <bool kBf16, int kRows, int kVecs, bool kRequest, class Emit>
TML_INLINE void multiply_fixed(const KStep* w, std::ptrdiff_t w_stride, const KStep* x,
                               std::int64_t num_steps, Requests& requests, const Emit& emit) {
  using S = Steps<kBf16>;
  Requests next = requests;
  Vec acc[kRows][kVecs];
  for (auto& row : acc)
    for (Vec& a : row) a = zero();
  for (std::int64_t k = 0; k < num_steps; ++k) {
    typename S::Weights weights[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) weights[v] = S::weights(w + v * 16);
    w += w_stride;
    if constexpr (kRequest) next.template advance<kVecs, (kRows <= kAskTwiceRows)>();
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const typename S::Input input = S::input(read_step(x + m * kRowSteps + k));
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[m][v] = S::dot(acc[m][v], weights[v], input);
    }
  }
  requests = next;
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) emit(m, v, acc[m][v]);
}

// One run of kVecs columns for all rows, tile by tile: the run stays in the L1 cache.
template <bool kBf16, int kVecs, bool kRequest, class Emit>
TML_INLINE void multiply_run(const KStep* w, std::ptrdiff_t w_stride, const KStep* x,
                             const TileSplit& tiles, std::int64_t num_steps, Requests& requests,
                             const Emit& emit) {
  for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
    const int first = static_cast<int>(tiles.begin(tile));
    with_rows<kRowsBeside<kVecs>>(tiles.rows(tile), [&](auto rows) TML_LAMBDA {
      multiply_fixed<kBf16, decltype(rows)::value, kVecs, kRequest>(
          w, w_stride, x + first * kRowSteps, num_steps, requests,
          [&](int m, int v, Vec acc) TML_LAMBDA { emit(first + m, v, acc); });
    });
  }
}

// emit(row, vec, acc): acc = sum over k of x[row][k] * w[k * w_stride + 16 * vec + lane]. The fewer
// the rows, the wider the run of columns: enough chains to hide the latency of one.
template <bool kBf16, bool kRequest, class Emit>
TML_INLINE void multiply_rows(const KStep* w, std::ptrdiff_t w_stride, int num_vecs, const KStep* x,
                              int num_rows, std::int64_t num_steps, const Ahead& ahead,
                              const Emit& emit) {
  const TileSplit tiles(num_rows);
  Requests requests(ahead, w, num_vecs * tiles.count * num_steps);
  int vec = 0;
  const auto emit_vec = [&](int m, int v, Vec acc) TML_LAMBDA { emit(m, vec + v, acc); };
  const auto take = [&](auto width) TML_LAMBDA {
    constexpr int kVecs = decltype(width)::value;
    if constexpr (kRowsBeside<kVecs> > 0) {
      const bool fits = kVecs <= 2 || num_rows <= kRowsBeside<kVecs>;
      for (; fits && vec + kVecs <= num_vecs; vec += kVecs)
        multiply_run<kBf16, kVecs, kRequest>(w + vec * 16, w_stride, x, tiles, num_steps, requests,
                                             emit_vec);
    }
  };
  take(Width<8>{});
  take(Width<4>{});
  take(Width<2>{});
  take(Width<1>{});
}

}  // namespace tml::cpu::TML_ISA_NS
