// read_bytes streams a buffer once, a contiguous share per thread; dot_peak repeats the inner step
// of panel.h on registers.
#include "ops/machine.h"

#include "core/memory.h"
#include "cpu/cpu.h"
#include "cpu/panel.h"
#include "cpu/parallel.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

constexpr std::int64_t kWords = 32;  // four cache lines in flight per step
constexpr std::int64_t kSlot = 8;    // a thread's partial sum has a cache line of its own

template <bool kBf16>
void dot_peak_typed(const DotPeakParams& p) {
  auto* sums = static_cast<float*>(
      scratch(Scratch::kOp, static_cast<std::size_t>(p.num_threads) * kSlot * 8));
  int used = 1;
  parallel(p.num_threads, [&](int thread, int num_threads) {
    using S = Steps<kBf16>;
    alignas(64) KStep ones[16];
    for (KStep& one : ones) one = kBf16 ? 0x3f803f80u : 0x3f800000u;
    const typename S::Weights weights = S::weights(ones);
    const typename S::Input input = S::input(ones[0]);
    Vec acc[kTileRows][2];
    for (auto& row : acc) row[0] = row[1] = zero();
    for (std::int64_t step = 0; step < p.num_steps; ++step) {
#pragma GCC unroll 16
      for (int m = 0; m < kTileRows; ++m) {
        acc[m][0] = S::dot(acc[m][0], weights, input);
        acc[m][1] = S::dot(acc[m][1], weights, input);
      }
    }
    Vec total = zero();
    for (auto& row : acc) total = add(total, add(row[0], row[1]));
    sums[thread * kSlot * 2] = hsum(total);
    if (thread == 0) used = num_threads;
  });
  *p.sum = 0.0f;
  for (int thread = 0; thread < used; ++thread) *p.sum += sums[thread * kSlot * 2];
  *p.flops = static_cast<double>(p.num_steps) * used * kTileRows * 2 * 16 * (kBf16 ? 4 : 2);
}

}  // namespace

void read_bytes(const ReadBytesParams& p) {
  auto* sums = static_cast<std::uint64_t*>(
      scratch(Scratch::kOp, static_cast<std::size_t>(p.num_threads) * kSlot * 8));
  const std::int64_t num_steps = p.num_words / kWords;
  int used = 1;
  parallel(p.num_threads, [&](int thread, int num_threads) {
    const Range steps = split(num_steps, thread, num_threads);
    std::uint64_t lanes[kWords] = {};
    for (std::int64_t step = steps.begin; step < steps.end; ++step)
      for (std::int64_t i = 0; i < kWords; ++i) lanes[i] += p.data[step * kWords + i];
    std::uint64_t sum = 0;
    for (const std::uint64_t lane : lanes) sum += lane;
    sums[thread * kSlot] = sum;
    if (thread == 0) used = num_threads;
  });
  std::uint64_t sum = 0;
  for (int thread = 0; thread < used; ++thread) sum += sums[thread * kSlot];
  for (std::int64_t i = num_steps * kWords; i < p.num_words; ++i) sum += p.data[i];
  *p.sum = sum;
}

void dot_peak(const DotPeakParams& p) {
  if (p.dtype == DType::kBf16) return dot_peak_typed<true>(p);
  dot_peak_typed<false>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
