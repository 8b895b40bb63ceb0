// attn_prologue: from the merged projection to what attention reads, over a step batch. A row of
// qkvr is q [num_heads, head_dim], k and v [num_kv_heads, head_dim], r [num_heads, d_rel].
//   K = rms_norm(round(k + conv(k)), k_norm) per head      V = round(v + conv(v))     into pages
//   Q = rms_norm(q, q_norm) per head                       R = r
//   if log_floor > 0: tau = 1 + log_alpha * ln(max((pos + 1) / log_floor, 1)), exactly 1 up to
//   the floor; Q = round(Q * tau), R = round(r * tau)
// conv[t] is fp32: an fma chain over the taps, oldest input first, started at 0; then x[t] is
// added. The three inputs before a sequence's first new token are its conv rows, which end up
// holding its last three k and v. rms_norm has its own contract; "round" is to the type of qkvr.
// Writing an even key of a bf16 V pair zeroes its odd partner: attention multiplies whole pairs.
#pragma once

#include "ops/step_batch.h"

namespace tml {

struct AttnPrologueParams {
  const void* qkvr;     // [num_tokens, (num_heads + 2 num_kv_heads) head_dim + num_heads d_rel]
  const float* k_conv;  // [num_kv_heads * head_dim, 4] oldest tap first
  const float* v_conv;  // [num_kv_heads * head_dim, 4]
  const void* q_norm;   // [head_dim]
  const void* k_norm;   // [head_dim]
  void* q;              // [num_tokens, num_heads, head_dim]
  void* r;              // [num_tokens, num_heads, d_rel]
  StepBatch batch;      // visible_end is not read
  KvPages pages;        // head_dim a multiple of 16
  ConvRows k_rows;
  ConvRows v_rows;
  std::int64_t qkvr_row_stride;
  std::int64_t num_heads;
  std::int64_t d_rel;
  float eps;
  float log_floor;  // 0: no log scaling
  float log_alpha;
  DType dtype;  // of qkvr, norms, q, r, pages and conv rows: kBf16 or kF32
  int num_threads;
};

}  // namespace tml
