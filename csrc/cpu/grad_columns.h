// Parameter gradients: sums over tokens, split over threads by column only. Inside a block of
// kGradBlock tokens ascending from 0, blocks added to 0 in ascending order.
#pragma once

#include <algorithm>

#include "core/contract.h"
#include "cpu/parallel.h"

namespace tml::cpu::TML_ISA_NS {

// sixteen columns from 16 * group on; the last group of a row may be narrower
TML_INLINE int group_width(std::int64_t group, std::int64_t dim) {
  return static_cast<int>(std::min<std::int64_t>(16, dim - group * 16));
}

template <class T>
TML_INLINE Vec load_part(const T* p, int count) {
  return count == 16 ? load_as_f32(p) : load_first_as_f32(p, count);
}
template <class T>
TML_INLINE void store_part(T* p, Vec a, int count) {
  if (count == 16)
    store_rounded(p, a);
  else
    store_first_rounded(p, a, count);
}

// For each group of `groups`: add(token, group, sums) extends the kSums chains of its columns by
// one token; emit(group, totals) gets the folded blocks once. Four groups walk the tokens together.
template <int kSums, class Add, class Emit>
TML_INLINE void grad_columns(Range groups, std::int64_t num_tokens, const Add& add_token,
                             const Emit& emit) {
  constexpr std::int64_t kRun = 4;
  for (std::int64_t first = groups.begin; first < groups.end; first += kRun) {
    const std::int64_t count = std::min(kRun, groups.end - first);
    Vec total[kRun][kSums];
    for (auto& sums : total)
      for (Vec& sum : sums) sum = zero();
    for (std::int64_t begin = 0; begin < num_tokens; begin += contract::kGradBlock) {
      const std::int64_t end = std::min(begin + contract::kGradBlock, num_tokens);
      Vec block[kRun][kSums];
      for (auto& sums : block)
        for (Vec& sum : sums) sum = zero();
      for (std::int64_t token = begin; token < end; ++token)
        for (std::int64_t i = 0; i < count; ++i) add_token(token, first + i, block[i]);
      for (std::int64_t i = 0; i < count; ++i)
        for (int s = 0; s < kSums; ++s) total[i][s] = add(total[i][s], block[i][s]);
    }
    for (std::int64_t i = 0; i < count; ++i) emit(first + i, total[i]);
  }
}

}  // namespace tml::cpu::TML_ISA_NS
