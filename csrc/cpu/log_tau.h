// The length scaling of queries (contract: ops/attn_prologue.h), shared by serving and training.
#pragma once

#include "cpu/vec.h"

namespace tml::cpu::TML_ISA_NS {

// 1 + alpha * ln(max((position + 1) / floor, 1)): exactly 1 up to the floor. floor > 0.
TML_INLINE float log_tau(std::int64_t position, float floor, float alpha) {
  const float ratio = static_cast<float>(position + 1) / floor;
  return ratio > 1.0f ? 1.0f + alpha * log1(ratio) : 1.0f;
}

}  // namespace tml::cpu::TML_ISA_NS
