// The device launchers: the ops of csrc/ops under the same names and parameters, plus what a launch
// is lent. Pointers are device memory; bf16 alone for products and pages. They return once the work
// is on the stream, and throw std::runtime_error, named after the op, when a launch is refused.
// Where the layout of an operand differs from the CPU's, cuda/layout.h has it.
#pragma once

#include <cstddef>

#include "cuda/lent.h"
#include "ops/attn_prologue.h"
#include "ops/attn_prologue_packed.h"
#include "ops/copy_pages.h"
#include "ops/dmel_embed.h"
#include "ops/embed.h"
#include "ops/embed_bwd.h"
#include "ops/hmlp_fold.h"
#include "ops/linear.h"
#include "ops/linear_logp.h"
#include "ops/linear_train.h"
#include "ops/lm_head.h"
#include "ops/moe.h"
#include "ops/moe_bwd.h"
#include "ops/rms_norm.h"
#include "ops/rms_norm_bwd.h"
#include "ops/router.h"
#include "ops/router_bwd.h"
#include "ops/sconv_norm.h"
#include "ops/sconv_norm_bwd.h"
#include "ops/session_attn.h"

namespace tml::cuda {

// The weight [out_dim, in_dim] in blocks of core tiles: packed_elements(out_dim, in_dim) bf16.
void pack_weight(const PackWeightParams& p, const Launch& launch);
void linear(const LinearParams& p, const Launch& launch);

void rms_norm(const RmsNormParams& p, const Launch& launch);
void embed(const EmbedParams& p, const Launch& launch);
void dmel_embed(const DmelEmbedParams& p, const Launch& launch);
// weight: plain fp32 [num_experts + num_shared, in_dim]. top_k + num_shared at most 32.
std::size_t router_workspace_bytes(const RouterParams& p);
void router(const RouterParams& p, const Launch& launch);

// Rows of logits pass through the workspace. A row's sum over the vocabulary blocks: M = max m_b,
// each of 256 threads adds s_b exp(m_b - M) by fma over b, b + 256, ..., then the tree of row_sum.
std::size_t lm_head_workspace_bytes(const LmHeadInput& input);
void lm_head_logprobs(const LmHeadLogprobsParams& p, const Launch& launch);
// top_k and top_p may be null: off in every row. Without a top_k the total that top_p is of is
// added by 512 threads over id, id + 512, ..., then halving.
void lm_head_sample(const LmHeadSampleParams& p, const Launch& launch);

void attn_prologue(const AttnPrologueParams& p, const Launch& launch);
std::size_t session_attn_workspace_bytes(const SessionAttnParams& p, int num_sms);
// rel_bank as on the CPU; K and V of a page in core tiles (page_offset).
void session_attn(const SessionAttnParams& p, const Launch& launch);

// w13: [num_matrices][ceil(width / 32) blocks of 64 rows, gate and up interleaved][k blocks]; w2:
// [num_matrices][blocks of hidden][k blocks of width].
void pack_experts(const PackExpertsParams& p, const Launch& launch);
std::size_t moe_workspace_bytes(const MoeParams& p);
void moe(const MoeParams& p, const Launch& launch);
void sconv_norm(const SconvNormParams& p, const Launch& launch);

// Gradients of rows. The order of the sums is that of csrc/ops, so the bits are the CPU's.
std::size_t rms_norm_bwd_workspace_bytes(const RmsNormBwdParams& p);
void rms_norm_bwd(const RmsNormBwdParams& p, const Launch& launch);
std::size_t embed_bwd_workspace_bytes(const EmbedBwdParams& p);
void embed_bwd(const EmbedBwdParams& p, const Launch& launch);
std::size_t dmel_embed_bwd_workspace_bytes(const DmelEmbedBwdParams& p);
void dmel_embed_bwd(const DmelEmbedBwdParams& p, const Launch& launch);
std::size_t sconv_norm_bwd_workspace_bytes(const SconvNormBwdParams& p);
void sconv_norm_bwd(const SconvNormBwdParams& p, const Launch& launch);

// bf16 alone, head_dim a multiple of 16 up to 128: K and V are attn_prologue's bits, gradients
// those of the CPU for the same operands.
void attn_prologue_packed(const AttnProloguePackedParams& p, const Launch& launch);
std::size_t attn_prologue_packed_bwd_workspace_bytes(const AttnProloguePackedBwdParams& p);
void attn_prologue_packed_bwd(const AttnProloguePackedBwdParams& p, const Launch& launch);
// Of the logits that router left. top_k of it at least 1.
std::size_t router_bwd_workspace_bytes(const RouterBwdParams& p);
void router_bwd(const RouterBwdParams& p, const Launch& launch);

// Products on plain matrices, bf16 alone: chains of the tensor core, cut where csrc/ops cuts them.
// Rows of x and dy are sixteen-byte aligned; in_dim of the first, out_dim of the second above 0.
std::size_t linear_plain_workspace_bytes(const LinearPlainParams& p);
void linear_plain(const LinearPlainParams& p, const Launch& launch);
std::size_t linear_dgrad_workspace_bytes(const LinearDgradParams& p);
void linear_dgrad(const LinearDgradParams& p, const Launch& launch);
std::size_t linear_wgrad_workspace_bytes(const LinearWgradParams& p);
void linear_wgrad(const LinearWgradParams& p, const Launch& launch);

// How linear_logp goes over tokens: `room` of them at a time (speed alone), and `chain` in one
// accumulator of dw, which is of the contract. room is a multiple of chain, or all tokens.
struct LogpTiling {
  std::int64_t chain, room;
};
constexpr LogpTiling logp_tiling(std::int64_t vocab_size) {
  const std::int64_t chain = logp_block(vocab_size);
  return {chain, std::max(chain, kLogitRoom / vocab_size / chain * chain)};
}
// Log-probabilities are those of lm_head_logprobs; the entropy is -sum p ln p, per thread of 256 an
// fma chain, then the tree of row_sum. A weight may come from a kernel just before.
std::size_t linear_logp_workspace_bytes(const LinearLogpParams& p, LogpTiling tiling);
void linear_logp(const LinearLogpParams& p, LogpTiling tiling, const Launch& launch);
std::size_t linear_logp_bwd_workspace_bytes(const LinearLogpBwdParams& p, LogpTiling tiling);
void linear_logp_bwd(const LinearLogpBwdParams& p, LogpTiling tiling, const Launch& launch);

// bf16 alone; dx_sum is not used. w13 and w2 plain; rows of dy sixteen-byte aligned.
std::size_t moe_bwd_workspace_bytes(const MoeBwdParams& p);
void moe_bwd(const MoeBwdParams& p, const Launch& launch);

void hmlp_fold(const HmlpFoldParams& p, const Launch& launch);
void copy_pages(const CopyPagesParams& p, const Launch& launch);

}  // namespace tml::cuda
