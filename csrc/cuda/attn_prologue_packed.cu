// attn_prologue_packed: a warp owns a head of a token, as attn_prologue does, and writes K and V
// dense. Its gradient: sixteen threads to a head of a token give the gradients of q, r and of the
// convolved k; then a block to a token goes back through the convolutions, and columns give the
// parameters, with the CPU's bits.
#include "cuda/conv_bwd.h"
#include "cuda/cuda.h"
#include "cuda/prologue.h"

namespace tml::cuda {
namespace {

constexpr int kWarps = kRowThreads / 32;

// Where k, v, r and the next row begin in a row of qkvr.
struct Widths {
  std::int64_t channels, k, v, r, row;
  TML_HOST_DEVICE explicit Widths(const PackedPrologue& p)
      : channels(p.num_kv_heads * p.head_dim),
        k(p.num_heads * p.head_dim),
        v(k + channels),
        r(v + channels),
        row(r + p.num_heads * p.d_rel) {}
};

TML_DEVICE float tau_of(const PackedPrologue& p, std::int64_t position) {
  return p.log_floor > 0.0f ? log_tau(position, p.log_floor, p.log_alpha) : 1.0f;
}

struct ForwardParams {
  AttnProloguePackedParams op;
  unsigned blocks_per_token;
};

TML_KERNEL(kRowThreads, 2) prologue_packed_kernel(const TML_GRID_CONSTANT ForwardParams p) {
  grid_launch_dependents();
  grid_wait();
  const PackedPrologue& in = p.op.in;
  const Widths at(in);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t token = blockIdx.x / p.blocks_per_token, dim = in.head_dim;
  const std::int64_t unit = blockIdx.x % p.blocks_per_token * kWarps + threadIdx.x / 32;
  if (unit >= in.num_heads + 2 * in.num_kv_heads) return;
  const bool is_inside = lane * 4 < dim;
  const Bf16* const row = static_cast<const Bf16*>(in.qkvr) + token * in.qkvr_row_stride;
  const std::int32_t seq = sequence_of(in.cu_tokens, static_cast<std::int32_t>(in.num_seqs), token);
  const std::int64_t position = token - in.cu_tokens[seq];
  float v[4];
  if (unit < in.num_heads) {
    const float tau = tau_of(in, position);
    load_four(v, row + unit * dim, lane, dim);
    norm_four(v, static_cast<const Bf16*>(in.q_norm), lane, dim, in.eps);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = __fmul_rn(v[i], tau);  // times 1 where nothing scales
    const std::int64_t out = token * in.num_heads + unit;
    if (is_inside) store_four(static_cast<Bf16*>(p.op.q) + out * dim + lane * 4, v);
    for (std::int64_t i = lane; i < in.d_rel; i += 32)
      put(static_cast<Bf16*>(p.op.r) + out * in.d_rel + i,
          __fmul_rn(as_float(row[at.r + unit * in.d_rel + i]), tau));
    return;
  }
  const bool is_v = unit >= in.num_heads + in.num_kv_heads;
  const std::int64_t head = (unit - in.num_heads) % in.num_kv_heads;
  const Bf16* const from = row + (is_v ? at.v : at.k) + head * dim;
  const float* const taps =
      (is_v ? in.v_conv : in.k_conv) + (head * dim + lane * 4) * contract::kConvTaps;
  float x[contract::kConvTaps][4] = {};
#pragma unroll
  for (int back = 0; back < contract::kConvTaps; ++back)
    if (back <= position)
      load_four(x[kHistory - back], from - back * in.qkvr_row_stride, lane, dim);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float w[contract::kConvTaps] = {};
    if (is_inside) {
#pragma unroll
      for (int tap = 0; tap < contract::kConvTaps; ++tap)
        w[tap] = taps[i * contract::kConvTaps + tap];
    }
    v[i] = convolved<Bf16>(w, x[0][i], x[1][i], x[2][i], x[3][i]);
  }
  if (!is_v) norm_four(v, static_cast<const Bf16*>(in.k_norm), lane, dim, in.eps);
  Bf16* const out = static_cast<Bf16*>(is_v ? p.op.v : p.op.k);
  if (is_inside) store_four(out + token * at.channels + head * dim + lane * 4, v);
}

struct GradParams {
  AttnProloguePackedBwdParams op;
  Neighbours* near;  // [num_tokens]
  float* tau;        // [num_tokens]
  float* q_rstd;     // [num_tokens, num_heads]
  float* k_rstd;     // [num_tokens, num_kv_heads]
  Bf16* k;           // [num_tokens, channels]: convolved, before the norm
  Bf16* dk;          // its gradient
  float* taps;       // [blocks, channels, 4] of K, then of V
  float* norms;      // [blocks, head_dim] of q, then of k
  std::int64_t blocks;
};

TML_KERNEL(kRowThreads, 4) prologue_heads_kernel(const TML_GRID_CONSTANT GradParams p) {
  grid_launch_dependents();
  grid_wait();
  const PackedPrologue& in = p.op.in;
  const Widths at(in);
  const std::int64_t units = in.num_heads + in.num_kv_heads, count = in.num_tokens * units;
  const bool is_row = own_row() < count;
  const std::int64_t row = is_row ? own_row() : count - 1;
  const std::int64_t token = row / units, unit = row % units, dim = in.head_dim;
  const Neighbours near = neighbours_of(in.cu_tokens, in.num_seqs, token);
  const std::int32_t seq = sequence_of(in.cu_tokens, static_cast<std::int32_t>(in.num_seqs), token);
  const float tau = tau_of(in, token - in.cu_tokens[seq]);
  if (is_row && unit == 0 && lane_of_row() == 0) {
    p.near[token] = near;
    p.tau[token] = tau;
  }
  const Bf16* const from = static_cast<const Bf16*>(in.qkvr) + token * in.qkvr_row_stride;
  Bf16* const out = static_cast<Bf16*>(p.op.dqkvr) + token * at.row;
  // The two halves of a warp may hold a query and a key: their sums are taken side by side.
  const bool is_query = unit < in.num_heads;
  const std::int64_t head = is_query ? unit : unit - in.num_heads;
  const std::int64_t channel = token * at.channels + head * dim;
  if (!is_query && is_row) {
    const Bf16* const x = from + at.k + head * dim;
    for (std::int64_t i = lane_of_row(); i < dim; i += contract::kLanes) {
      float inputs[contract::kConvTaps], taps[contract::kConvTaps];
#pragma unroll
      for (int tap = 0; tap < contract::kConvTaps; ++tap) {
        const int back = kHistory - tap;
        inputs[tap] = back <= near.before ? as_float(x[i - back * in.qkvr_row_stride]) : 0.0f;
        taps[tap] = in.k_conv[(head * dim + i) * contract::kConvTaps + tap];
      }
      put(p.k + channel + i, convolved<Bf16>(taps, inputs[0], inputs[1], inputs[2], inputs[3]));
    }
  }
  const std::int64_t q_row = token * in.num_heads + head;
  const Bf16* const x = is_query ? from + head * dim : p.k + channel;
  const auto* const weight = static_cast<const Bf16*>(is_query ? in.q_norm : in.k_norm);
  const Bf16* const dy = is_query ? static_cast<const Bf16*>(p.op.dq) + q_row * dim
                                  : static_cast<const Bf16*>(p.op.dk) + channel;
  const float scale = is_query ? tau : 1.0f;
  const auto upstream = [&](std::int64_t i, float, float) {
    return __fmul_rn(as_float(dy[i]), scale);
  };
  const NormRow stats = norm_row(x, weight, dim, in.eps, upstream);
  if (!is_row) return;
  if (lane_of_row() == 0)
    (is_query ? p.q_rstd[q_row] : p.k_rstd[token * in.num_kv_heads + head]) = stats.rstd;
  Bf16* const dx = is_query ? out + head * dim : p.dk + channel;
  norm_row_dx(x, weight, dim, stats, upstream,
              [&](std::int64_t i, float value) { put(dx + i, value); });
  if (!is_query) return;
  const Bf16* const dr = static_cast<const Bf16*>(p.op.dr) + q_row * in.d_rel;
  for (std::int64_t i = lane_of_row(); i < in.d_rel; i += contract::kLanes)
    put(out + at.r + head * in.d_rel + i, __fmul_rn(as_float(dr[i]), tau));
}

TML_KERNEL(kRowThreads, 4) prologue_inputs_kernel(const TML_GRID_CONSTANT GradParams p) {
  grid_launch_dependents();
  grid_wait();
  const PackedPrologue& in = p.op.in;
  const Widths at(in);
  const std::int64_t token = blockIdx.x;
  const Neighbours near = p.near[token];
  Bf16* const out = static_cast<Bf16*>(p.op.dqkvr) + token * at.row;
  const Bf16* const dk = p.dk + token * at.channels;
  const Bf16* const dv = static_cast<const Bf16*>(p.op.dv) + token * at.channels;
  for (std::int64_t c = threadIdx.x; c < at.channels; c += kRowThreads) {
    put(out + at.k + c, conv_dx(in.k_conv + c * contract::kConvTaps, dk + c, at.channels, near));
    put(out + at.v + c, conv_dx(in.v_conv + c * contract::kConvTaps, dv + c, at.channels, near));
  }
}

TML_KERNEL(kRowThreads, 4) prologue_taps_kernel(const TML_GRID_CONSTANT GradParams p) {
  grid_launch_dependents();
  grid_wait();
  const PackedPrologue& in = p.op.in;
  const Widths at(in);
  grad_columns(in.num_tokens, 2 * at.channels,
               [&](std::int64_t block, std::int64_t column, std::int64_t begin, std::int64_t end) {
                 const bool is_v = column >= at.channels;
                 const std::int64_t c = is_v ? column - at.channels : column;
                 const Bf16* const g = (is_v ? static_cast<const Bf16*>(p.op.dv) : p.dk) + c;
                 const Bf16* const x = static_cast<const Bf16*>(in.qkvr) + (is_v ? at.v : at.k) + c;
                 float taps[contract::kConvTaps] = {};
#pragma unroll 4
                 for (std::int64_t t = begin; t < end; ++t)
                   add_taps(taps, as_float(g[t * at.channels]), x + t * in.qkvr_row_stride,
                            in.qkvr_row_stride, p.near[t]);
                 float* const out = p.taps + (((is_v ? p.blocks : 0) + block) * at.channels + c) *
                                                 contract::kConvTaps;
#pragma unroll
                 for (int tap = 0; tap < contract::kConvTaps; ++tap) out[tap] = taps[tap];
               });
}

TML_KERNEL(kRowThreads, 4) prologue_norms_kernel(const TML_GRID_CONSTANT GradParams p) {
  grid_launch_dependents();
  grid_wait();
  const PackedPrologue& in = p.op.in;
  const Widths at(in);
  const std::int64_t dim = in.head_dim;
  grad_columns(in.num_tokens, 2 * dim,
               [&](std::int64_t block, std::int64_t column, std::int64_t begin, std::int64_t end) {
                 const bool is_k = column >= dim;
                 const std::int64_t c = is_k ? column - dim : column;
                 const std::int64_t heads = is_k ? in.num_kv_heads : in.num_heads;
                 const auto* const dy = static_cast<const Bf16*>(is_k ? p.op.dk : p.op.dq) + c;
                 const Bf16* const rows = (is_k ? p.k : static_cast<const Bf16*>(in.qkvr)) + c;
                 const std::int64_t stride = is_k ? at.channels : in.qkvr_row_stride;
                 const float* const rstd = is_k ? p.k_rstd : p.q_rstd;
                 float sum = 0.0f;
                 for (std::int64_t t = begin; t < end; ++t) {
                   const float scale = is_k ? 1.0f : p.tau[t];
#pragma unroll 4
                   for (std::int64_t head = 0; head < heads; ++head) {
                     const float e = __fmul_rn(as_float(dy[(t * heads + head) * dim]), scale);
                     const float x = as_float(rows[t * stride + head * dim]);
                     sum = __fmaf_rn(e, normed_value<Bf16>(x, rstd[t * heads + head]), sum);
                   }
                 }
                 p.norms[((is_k ? p.blocks : 0) + block) * dim + c] = sum;
               });
}

GradParams parts_of(const AttnProloguePackedBwdParams& p, void* base, std::size_t* num_bytes) {
  const PackedPrologue& in = p.in;
  const Widths at(in);
  Workspace parts(base);
  GradParams out{};
  out.op = p;
  out.blocks = grad_blocks(in.num_tokens);
  out.near = parts.take<Neighbours>(in.num_tokens);
  out.tau = parts.take<float>(in.num_tokens);
  out.q_rstd = parts.take<float>(in.num_tokens * in.num_heads);
  out.k_rstd = parts.take<float>(in.num_tokens * in.num_kv_heads);
  out.k = parts.take<Bf16>(in.num_tokens * at.channels);
  out.dk = parts.take<Bf16>(in.num_tokens * at.channels);
  out.taps = parts.take<float>(2 * out.blocks * at.channels * contract::kConvTaps);
  out.norms = parts.take<float>(2 * out.blocks * in.head_dim);
  *num_bytes = parts.used();
  return out;
}

void check_head_dim(const char* op, const PackedPrologue& in) {
  if (in.head_dim % contract::kLanes != 0 || in.head_dim > kMaxHeadDim)
    throw std::invalid_argument(std::string(op) +
                                ": head_dim must be a multiple of 16 up to 128, got " +
                                std::to_string(in.head_dim));
}

}  // namespace

void attn_prologue_packed(const AttnProloguePackedParams& p, const Launch& launch) {
  if (p.in.num_tokens == 0) return;
  check_head_dim("attn_prologue_packed", p.in);
  const unsigned blocks = blocks_for(p.in.num_heads + 2 * p.in.num_kv_heads, kWarps);
  launch_kernel("attn_prologue_packed", launch, prologue_packed_kernel,
                static_cast<unsigned>(p.in.num_tokens) * blocks, kRowThreads, 0,
                ForwardParams{p, blocks});
}

std::size_t attn_prologue_packed_bwd_workspace_bytes(const AttnProloguePackedBwdParams& p) {
  std::size_t num_bytes = 0;
  parts_of(p, nullptr, &num_bytes);
  return num_bytes;
}

void attn_prologue_packed_bwd(const AttnProloguePackedBwdParams& p, const Launch& launch) {
  constexpr const char* kOp = "attn_prologue_packed_bwd";
  const PackedPrologue& in = p.in;
  check_head_dim(kOp, in);
  std::size_t num_bytes = 0;
  const GradParams params = parts_of(p, launch.workspace, &num_bytes);
  check_workspace(kOp, launch, num_bytes);
  const std::int64_t channels = in.num_kv_heads * in.head_dim;
  if (in.num_tokens > 0) {
    launch_kernel(kOp, launch, prologue_heads_kernel,
                  blocks_for(in.num_tokens * (in.num_heads + in.num_kv_heads), kGradRows),
                  kRowThreads, 0, params);
    launch_kernel(kOp, launch, prologue_inputs_kernel, static_cast<unsigned>(in.num_tokens),
                  kRowThreads, 0, params);
    launch_kernel(kOp, launch, prologue_taps_kernel, grad_columns_grid(in.num_tokens, 2 * channels),
                  kRowThreads, 0, params);
    launch_kernel(kOp, launch, prologue_norms_kernel,
                  grad_columns_grid(in.num_tokens, 2 * in.head_dim), kRowThreads, 0, params);
  }
  const std::int64_t taps = channels * contract::kConvTaps;
  fold_blocks(kOp, launch, params.taps, params.blocks, taps, p.dk_conv, DType::kF32);
  fold_blocks(kOp, launch, params.taps + params.blocks * taps, params.blocks, taps, p.dv_conv,
              DType::kF32);
  fold_blocks(kOp, launch, params.norms, params.blocks, in.head_dim, p.dq_norm, DType::kBf16);
  fold_blocks(kOp, launch, params.norms + params.blocks * in.head_dim, params.blocks, in.head_dim,
              p.dk_norm, DType::kBf16);
}

}  // namespace tml::cuda
