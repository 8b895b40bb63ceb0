// lm_head_logprobs for those who need more of it than the log-probabilities.
#pragma once

#include "cuda/launch.h"
#include "ops/lm_head.h"

namespace tml::cuda {

struct VocabRows {
  const float* logits;  // [num_tokens, vocab_size]
  const float* lse;     // [num_tokens]
};

// As lm_head_logprobs, of a weight that a kernel just before may still be writing. What it returns
// lies in the workspace (lm_head_workspace_bytes) until somebody else is lent that.
VocabRows vocab_logprobs(const char* op, const LmHeadLogprobsParams& p, const Launch& launch);

}  // namespace tml::cuda
