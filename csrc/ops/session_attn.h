// session_attn: new tokens of a ragged batch against the paged K and V of their sequences.
//   s[k] = fma(q . k, scale, bias),  bias = r . P[:, q - k] (0 outside 0 <= q - k < rel_len)
//   o = softmax(s over visible keys) V,  lse = ln sum exp(s)
// Key k is visible to the query at position q iff k <= visible_end, window == 0 or q - k < window,
// and its page is present. Query head h reads KV head h / (num_heads / num_kv_heads).
//
// The bits are a function of absolute positions only. Dot products are fp32 chains in ascending
// order (bf16: odd element of a pair first) that are never rounded in between. A unit is the 128
// keys of one page:
//   m = max of visible s,  p = exp(s - m) (0 where masked),  l = sum of unrounded p: the eight
//   vectors v as ((v0+v1)+(v2+v3))+((v4+v5)+(v6+v7)), then the halving tree of lanes,
//   O = chain over keys, ascending, of round(p) * V
//   fold(a, b): m = max(ma, mb), x = exp(ma - m), y = exp(mb - m), l = fma(lb, y, la * x),
//               O = fma(Ob, y, Oa * x)
// Units are left-folded inside segments of 2048 absolute positions, segments are left-folded. A
// unit without a visible key is the neutral element (m = -1e30, l = 0, O = 0) and so is the start
// of a fold. o = round(O / l + 0), lse = m + ln l; a row that sees nothing gets o = 0, lse = -inf.
// Scores are expected above -1e30; K and V past the last written key are never added, even NaN (but
// the odd partner of a last even bf16 key of V must be 0).
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "ops/step_batch.h"

namespace tml {

// Zero k-steps before and after the distances of a packed relative bank.
inline constexpr std::int64_t kRelPad = 128;

struct SessionAttnParams {
  const void* q;         // [num_tokens, num_heads, head_dim]
  const void* r;         // [num_tokens, num_heads, rel_dim]
  const void* rel_bank;  // [k_steps(rel_dim)][pad + rel_len + pad] k-steps, distances descending
  void* out;             // [num_tokens, num_heads * head_dim]
  float* lse;            // [num_tokens, num_heads], or null
  KvPages kv;            // the step's own K and V are already written
  StepBatch batch;
  std::int64_t window;  // 0: all keys
  std::int64_t rel_len;
  std::int32_t rel_dim;
  std::int32_t num_heads;
  float scale;
  DType dtype;  // of q, r, rel_bank, out and the pages: kBf16 or kF32
  int num_threads;
};

}  // namespace tml
