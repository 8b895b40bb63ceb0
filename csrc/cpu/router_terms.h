// The softmax over log-sigmoids that weighs experts: forward and backward use the same numbers.
#pragma once

#include "cpu/vec.h"

namespace tml::cpu::TML_ISA_NS {

TML_INLINE float log_sigmoid(float l) {
  if (l != l) return l;  // log1 is defined for numbers only
  const float magnitude = l < 0.0f ? -l : l;
  return (l < 0.0f ? l : 0.0f) - log1(1.0f + exp1(-magnitude));
}

// term[i] = exp(ls_i - max ls) for the log-sigmoids ls of logit_of(i); returns their sum.
template <class LogitOf>
TML_INLINE float softmax_terms(int num_terms, const LogitOf& logit_of, float* term) {
  float top = 0.0f;
  for (int i = 0; i < num_terms; ++i) {
    term[i] = log_sigmoid(logit_of(i));
    if (i == 0 || term[i] > top) top = term[i];
  }
  float sum = 0.0f;
  for (int i = 0; i < num_terms; ++i) {
    term[i] = exp1(term[i] - top);
    sum = sum + term[i];
  }
  return sum;
}

}  // namespace tml::cpu::TML_ISA_NS
