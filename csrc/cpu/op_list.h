// Every op with a CPU kernel: its name and its contract. Adding an op is one include and one line.
#pragma once

#include "ops/attn_prologue.h"
#include "ops/attn_prologue_packed.h"
#include "ops/dmel_embed.h"
#include "ops/embed.h"
#include "ops/embed_bwd.h"
#include "ops/linear.h"
#include "ops/linear_logp.h"
#include "ops/linear_train.h"
#include "ops/lm_head.h"
#include "ops/machine.h"
#include "ops/moe.h"
#include "ops/moe_bwd.h"
#include "ops/rms_norm.h"
#include "ops/rms_norm_bwd.h"
#include "ops/router.h"
#include "ops/router_bwd.h"
#include "ops/sconv_norm.h"
#include "ops/sconv_norm_bwd.h"
#include "ops/session_attn.h"
#include "ops/session_attn_bwd.h"

#define TML_CPU_OPS(X)                                     \
  X(pack_weight, PackWeightParams)                         \
  X(linear, LinearParams)                                  \
  X(linear_plain, LinearPlainParams)                       \
  X(linear_dgrad, LinearDgradParams)                       \
  X(linear_wgrad, LinearWgradParams)                       \
  X(rms_norm_bwd, RmsNormBwdParams)                        \
  X(embed_bwd, EmbedBwdParams)                             \
  X(dmel_embed_bwd, DmelEmbedBwdParams)                    \
  X(sconv_norm_bwd, SconvNormBwdParams)                    \
  X(attn_prologue_packed, AttnProloguePackedParams)        \
  X(attn_prologue_packed_bwd, AttnProloguePackedBwdParams) \
  X(read_bytes, ReadBytesParams)                           \
  X(dot_peak, DotPeakParams)                               \
  X(pack_experts, PackExpertsParams)                       \
  X(moe, MoeParams)                                        \
  X(moe_bwd, MoeBwdParams)                                 \
  X(router_bwd, RouterBwdParams)                           \
  X(router, RouterParams)                                  \
  X(rms_norm, RmsNormParams)                               \
  X(embed, EmbedParams)                                    \
  X(dmel_embed, DmelEmbedParams)                           \
  X(attn_prologue, AttnPrologueParams)                     \
  X(session_attn, SessionAttnParams)                       \
  X(sconv_norm, SconvNormParams)                           \
  X(lm_head_logprobs, LmHeadLogprobsParams)                \
  X(linear_logp, LinearLogpParams)                         \
  X(linear_logp_bwd, LinearLogpBwdParams)                  \
  X(session_attn_bwd, SessionAttnBwdParams)                \
  X(lm_head_sample, LmHeadSampleParams)
