// session_attn_bwd: gradients of session_attn over whole packed sequences (every token's position
// is its index in its sequence). With s, bias, visibility and lse as in ops/session_attn.h:
//   p = exp(s - lse), 0 where masked        dp = do . v        delta = sum_d do * o (16 lanes)
//   ds = p * (dp - delta)
//   dv[k] = round(sum round(p) * do)        dk[k] = round(scale * sum round(ds) * q)
//   dq    = round(scale * sum_k round(ds) * k)
//   dr    = round(sum_k ds * bank[:, q - k])
//   dbank[:, d] = sum over (q, k) with q - k = d of ds * r
// s has the forward's bits. Query rows of a KV head are ordered (token, head of the group) and
// taken in tiles of 64 / group tokens from the start of the sequence. dk and dv of a key: one fp32
// chain over the rows, ascending (bf16: pairs inside a tile, odd row first). dq and dr of a row:
// one chain over the keys. dbank, fp32: per sequence, KV head and block of 512 keys one chain over
// (unit, row), ascending; blocks left-folded, then sequences (outer) and KV heads (inner) in
// ascending order.
#pragma once

#include "ops/session_attn.h"

namespace tml {

struct SessionAttnBwdParams {
  const void* q;         // [num_tokens, num_heads, head_dim]
  const void* k;         // [num_tokens, num_kv_heads, head_dim]
  const void* v;         // [num_tokens, num_kv_heads, head_dim]
  const void* r;         // [num_tokens, num_heads, rel_dim]
  const void* rel_bank;  // as in SessionAttnParams
  const void* out;       // [num_tokens, num_heads * head_dim]
  const float* lse;      // [num_tokens, num_heads]
  const void* d_out;     // [num_tokens, num_heads * head_dim]
  void* dq;              // as q
  void* dk;              // as k
  void* dv;              // as v
  void* dr;              // as r
  float* dbank;          // [rel_dim, rel_len]
  StepBatch batch;       // every start_pos is 0
  std::int64_t window;   // 0: all keys
  std::int64_t rel_len;
  std::int32_t rel_dim;
  std::int32_t num_heads;
  std::int32_t num_kv_heads;
  std::int32_t head_dim;
  float scale;
  DType dtype;  // of everything but lse and dbank: kBf16 or kF32
  int num_threads;
};

}  // namespace tml
