// attn_prologue_packed: attn_prologue over whole sequences packed one after the other (zero state
// and position 0 at the start of each), its K and V dense: the same bits as in the pages.
// attn_prologue_packed_bwd: its gradients. Sequence s owns tokens [cu_tokens[s], cu_tokens[s + 1]).
//   dq goes back through tau (fp32) and the norm; dr is round(dr * tau); the gradient of round(k +
//   conv(k)) is rounded once; through the convolution as in sconv_norm_bwd; norms as in
//   rms_norm_bwd, a row per head. Parameter gradients: blocks of kGradBlock tokens of the batch,
//   each an fma chain from 0 over ascending tokens, then heads; blocks are added to 0 in ascending
//   order; convolutions stay fp32, norms are rounded to the type of qkvr.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tml {

struct PackedPrologue {           // what both directions read; widths as in ops/attn_prologue.h
  const void* qkvr;               // [num_tokens, width], rows qkvr_row_stride elements apart
  const float* k_conv;            // [num_kv_heads * head_dim, 4] oldest tap first
  const float* v_conv;            // [num_kv_heads * head_dim, 4]
  const void* q_norm;             // [head_dim]
  const void* k_norm;             // [head_dim]
  const std::int32_t* cu_tokens;  // [num_seqs + 1]
  std::int64_t qkvr_row_stride;
  std::int64_t num_seqs;
  std::int64_t num_tokens;
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
  std::int64_t head_dim;  // a multiple of 16
  std::int64_t d_rel;
  float eps;
  float log_floor;  // 0: no log scaling
  float log_alpha;
  DType dtype;  // of all but the convolutions: kBf16 or kF32
  int num_threads;
};

struct AttnProloguePackedParams {
  PackedPrologue in;
  void* q;  // [num_tokens, num_heads, head_dim]
  void* k;  // [num_tokens, num_kv_heads, head_dim]
  void* v;  // [num_tokens, num_kv_heads, head_dim]
  void* r;  // [num_tokens, num_heads, d_rel]
};

struct AttnProloguePackedBwdParams {
  PackedPrologue in;
  const void* dq;  // shapes of q, k, v, r
  const void* dk;
  const void* dv;
  const void* dr;
  void* dqkvr;     // [num_tokens, width] dense
  float* dk_conv;  // [num_kv_heads * head_dim, 4]
  float* dv_conv;  // [num_kv_heads * head_dim, 4]
  void* dq_norm;   // [head_dim]
  void* dk_norm;   // [head_dim]
};

}  // namespace tml
