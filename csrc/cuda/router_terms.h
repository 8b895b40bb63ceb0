// What the router's forward and backward both make of a logit.
#pragma once

#include "cuda/math.h"

namespace tml::cuda {

TML_DEVICE float log_sigmoid(float l) {
  if (l != l) return l;
  const float magnitude = l < 0.0f ? -l : l;
  return __fadd_rn(l < 0.0f ? l : 0.0f, -log_poly(__fadd_rn(1.0f, exp_poly(-magnitude))));
}

}  // namespace tml::cuda
