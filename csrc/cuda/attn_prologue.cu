// attn_prologue: a warp owns a head of a token, four channels to a lane: a query head, or K or V of
// a KV head (the first three tokens of a sequence together, cuda/step.h). The norm of a head is an
// fma chain over a lane's channels, then the tree of warp_sum. K and V go to their page as core
// tiles.
#include "cuda/cuda.h"
#include "cuda/prologue.h"

namespace tml::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct PrologueParams {
  AttnPrologueParams op;
  unsigned blocks_per_token;
};

TML_DEVICE void write_query(const AttnPrologueParams& op, std::int64_t token, std::int64_t head) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t dim = op.pages.head_dim;
  const Bf16* row = static_cast<const Bf16*>(op.qkvr) + token * op.qkvr_row_stride;
  const Bf16* r_in = row + (op.num_heads + 2 * op.pages.num_kv_heads) * dim + head * op.d_rel;
  Bf16* const q = static_cast<Bf16*>(op.q) + (token * op.num_heads + head) * dim;
  Bf16* const r = static_cast<Bf16*>(op.r) + (token * op.num_heads + head) * op.d_rel;
  float tau = 1.0f;
  if (op.log_floor > 0.0f) {
    const std::int32_t seq = sequence_of(op.batch.cu_tokens, op.batch.num_seqs, token);
    tau = log_tau(op.batch.start_pos[seq] + token - op.batch.cu_tokens[seq], op.log_floor,
                  op.log_alpha);
  }
  float v[4];
  load_four(v, row + head * dim, lane, dim);
  norm_four(v, static_cast<const Bf16*>(op.q_norm), lane, dim, op.eps);
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = __fmul_rn(v[i], tau);  // times 1 where nothing scales
  if (lane * 4 < dim) store_four(q + lane * 4, v);
  for (std::int64_t i = lane; i < op.d_rel; i += 32)
    r[i] = static_cast<Bf16>(pack_bf16(__fmul_rn(low_bf16(r_in[i]), tau), 0.0f));
}

TML_DEVICE void write_key_or_value(const AttnPrologueParams& op, std::int64_t token, bool is_v,
                                   std::int64_t head) {
  const StepShare share = share_of(op.batch, token);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t dim = op.pages.head_dim, channel = head * dim + lane * 4;
  const bool is_inside = lane * 4 < dim;
  const ConvRows& rows = is_v ? op.v_rows : op.k_rows;
  const std::int64_t slot = op.batch.slots[share.seq];
  const ConvInput<Bf16> input{
      static_cast<const Bf16*>(op.qkvr) + op.batch.cu_tokens[share.seq] * op.qkvr_row_stride +
          (op.num_heads + (is_v ? op.pages.num_kv_heads : 0) + head) * dim,
      op.qkvr_row_stride, static_cast<Bf16*>(rows.rows) + slot * rows.slot_stride + head * dim,
      rows.row_stride};
  float taps[4][4] = {};
  if (is_inside && share.count > 0) {
    const float* weight = (is_v ? op.v_conv : op.k_conv) + channel * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 w = *reinterpret_cast<const float4*>(weight + i * 4);
      taps[i][0] = w.x, taps[i][1] = w.y, taps[i][2] = w.z, taps[i][3] = w.w;
    }
  }
  for (std::int64_t t = share.offset; t < share.offset + share.count; ++t) {
    float x[4][4], v[4];
#pragma unroll
    for (int tap = 0; tap < 4; ++tap) load_four(x[tap], input.row(t - kHistory + tap), lane, dim);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = convolved<Bf16>(taps[i], x[0][i], x[1][i], x[2][i], x[3][i]);
    if (!is_v) norm_four(v, static_cast<const Bf16*>(op.k_norm), lane, dim, op.eps);
    const std::int64_t position = op.batch.start_pos[share.seq] + t;
    const std::int64_t page =
        op.pages.table[slot * op.pages.table_row_stride + position / contract::kPageLen];
    Bf16* const block = static_cast<Bf16*>(op.pages.pages) + page * op.pages.page_stride +
                        head * op.pages.head_stride + (is_v ? contract::kPageLen * dim : 0);
    if (is_inside) store_four(block + page_offset(position % contract::kPageLen, lane * 4, dim), v);
  }
  if (share.offset != 0 || !is_inside) return;
  Bf16 last[kHistory][4];
#pragma unroll
  for (int i = 0; i < kHistory; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      last[i][j] = input.row(share.seq_tokens - kHistory + i)[lane * 4 + j];
#pragma unroll
  for (int i = 0; i < kHistory; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) input.state[i * input.state_row_stride + lane * 4 + j] = last[i][j];
}

TML_KERNEL(kThreads, 2) attn_prologue_kernel(const TML_GRID_CONSTANT PrologueParams p) {
  grid_launch_dependents();
  grid_wait();
  const AttnPrologueParams& op = p.op;
  const std::int64_t token = blockIdx.x / p.blocks_per_token;
  const std::int64_t unit = blockIdx.x % p.blocks_per_token * kWarps + threadIdx.x / 32;
  const std::int64_t kv_heads = op.pages.num_kv_heads;
  if (unit < op.num_heads)
    write_query(op, token, unit);
  else if (unit < op.num_heads + 2 * kv_heads)
    write_key_or_value(op, token, unit >= op.num_heads + kv_heads,
                       (unit - op.num_heads) % kv_heads);
}

}  // namespace

void attn_prologue(const AttnPrologueParams& p, const Launch& launch) {
  if (p.batch.num_tokens == 0) return;
  if (p.pages.head_dim % 8 != 0 || p.pages.head_dim > kMaxHeadDim)
    throw std::invalid_argument("attn_prologue: head_dim must be a multiple of 8 up to 128, got " +
                                std::to_string(p.pages.head_dim));
  const auto units = static_cast<unsigned>(p.num_heads + 2 * p.pages.num_kv_heads);
  const unsigned blocks = (units + kWarps - 1) / kWarps;
  launch_kernel("attn_prologue", launch, attn_prologue_kernel,
                static_cast<unsigned>(p.batch.num_tokens) * blocks, kThreads, 0,
                PrologueParams{p, blocks});
}

}  // namespace tml::cuda
