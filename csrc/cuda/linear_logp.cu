// linear_logp: for as many tokens as there is room for, lm_head_logprobs, which leaves the logits;
// backward makes dl of them, from which dh and dw are products. A weight and its transpose are
// packed once a call.
#include "cuda/cuda.h"
#include "cuda/norm_bwd.h"
#include "cuda/vocab.h"
#include "cuda/wgrad.h"

namespace tml::cuda {
namespace {

constexpr int kOwnEntries = 4;  // of a thread, kRowThreads apart
constexpr std::int64_t kBlockEntries = kRowThreads * kOwnEntries;

struct RowParams {
  VocabRows rows;
  const std::int64_t* targets;
  const float* d_logprobs;
  const float* d_entropy;  // or null
  float* entropy;
  Bf16* dl;
  std::int64_t dl_row_stride;
  std::int64_t vocab_size;
};

// -sum p ln p of a row: per thread an fma chain over ids 256 apart, then the tree of row_sum.
TML_KERNEL(kRowThreads, 4) entropy_kernel(const TML_GRID_CONSTANT RowParams p) {
  grid_launch_dependents();
  grid_wait();
  const std::int64_t row = blockIdx.x;
  const float* const logits = p.rows.logits + row * p.vocab_size;
  const float lse = p.rows.lse[row];
  float sum = 0.0f;
#pragma unroll 4
  for (std::int64_t id = threadIdx.x; id < p.vocab_size; id += kRowThreads) {
    const float logp = __fadd_rn(logits[id], -lse), prob = exp_poly(logp);
    if (prob != 0.0f) sum = __fmaf_rn(prob, logp, sum);
  }
  sum = row_sum(sum, reinterpret_cast<float*>(shared_memory()));
  if (threadIdx.x == 0) p.entropy[row] = -sum;
}

TML_KERNEL(kRowThreads, 4) dl_kernel(const TML_GRID_CONSTANT RowParams p) {
  grid_launch_dependents();
  grid_wait();
  const std::int64_t chunks = (p.vocab_size + kBlockEntries - 1) / kBlockEntries;
  const std::int64_t row = blockIdx.x / chunks;
  const std::int64_t first = blockIdx.x % chunks * kBlockEntries + threadIdx.x;
  const float* const logits = p.rows.logits + row * p.vocab_size;
  Bf16* const dl = p.dl + row * p.dl_row_stride;
  const float g = p.d_logprobs[row], lse = p.rows.lse[row];
  const bool has_entropy = p.d_entropy != nullptr;
  const float minus_ge = has_entropy ? -p.d_entropy[row] : 0.0f;
  const float entropy = has_entropy ? p.entropy[row] : 0.0f;
  const std::int64_t target = p.targets[row];
#pragma unroll
  for (int j = 0; j < kOwnEntries; ++j) {
    const std::int64_t id = first + j * kRowThreads;
    if (id >= p.vocab_size) break;
    const float logp = __fadd_rn(logits[id], -lse), prob = exp_poly(logp);
    float value = id == target ? __fmul_rn(g, __fadd_rn(1.0f, -prob)) : __fmul_rn(-g, prob);
    if (has_entropy) value = __fmaf_rn(__fmul_rn(minus_ge, prob), __fadd_rn(logp, entropy), value);
    put(dl + id, value);
  }
}

// Tokens of `input` from `begin` on.
LmHeadInput rows_of(const LmHeadInput& input, std::int64_t begin, std::int64_t count) {
  LmHeadInput out = input;
  out.h = static_cast<const Bf16*>(input.h) + begin * input.h_row_stride;
  out.num_tokens = count;
  return out;
}

LogpTiling clamped(LogpTiling tiling, std::int64_t num_tokens) {
  if (tiling.room > num_tokens) tiling.room = num_tokens;
  return tiling;
}

// log-probabilities of rows [begin, begin + count) and, if asked for, entropies.
VocabRows forward_rows(const char* op, const LmHeadInput& rows, const std::int64_t* targets,
                       float* logprobs, float* entropy, const Launch& launch) {
  const VocabRows found = vocab_logprobs(op, {rows, targets, logprobs, 0}, launch);
  if (entropy != nullptr) {
    RowParams params{};
    params.rows = found;
    params.entropy = entropy;
    params.vocab_size = rows.vocab_size;
    launch_kernel(op, launch, entropy_kernel, static_cast<unsigned>(rows.num_tokens), kRowThreads,
                  kRowSharedBytes, params);
  }
  return found;
}

struct BwdWork {
  void* vocab;
  std::size_t vocab_bytes;
  Bf16* dl;
  std::int64_t dl_row_stride;
  float* entropy;
  Bf16* turned_weight;
  WgradWork wgrad;
  float* dw;  // where several passes add to it
  std::size_t num_bytes;

  BwdWork(const LinearLogpBwdParams& p, LogpTiling tiling, void* base)
      : BwdWork(p, tiling, Workspace(base)) {}

 private:
  BwdWork(const LinearLogpBwdParams& p, LogpTiling tiling, Workspace parts)
      : vocab_bytes(lm_head_workspace_bytes(rows_of(p.input, 0, tiling.room))),
        dl_row_stride((p.input.vocab_size + 7) / 8 * 8),
        wgrad(wgrad_of(p, tiling), tiling.chain, parts) {
    const bool is_one_pass = tiling.room >= p.input.num_tokens;
    vocab = parts.take<char>(static_cast<std::int64_t>(vocab_bytes));
    dl = parts.take<Bf16>(tiling.room * dl_row_stride);
    entropy = parts.take<float>(tiling.room);
    turned_weight = parts.take<Bf16>(packed_elements(p.input.in_dim, p.input.vocab_size));
    dw = parts.take<float>(is_one_pass ? 0 : p.input.vocab_size * p.input.in_dim);
    num_bytes = parts.used();
  }
  static LinearWgradParams wgrad_of(const LinearLogpBwdParams& p, LogpTiling tiling) {
    LinearWgradParams out{};
    out.num_tokens = tiling.room;
    out.in_dim = p.input.in_dim;
    out.out_dim = p.input.vocab_size;
    return out;
  }
};

}  // namespace

std::size_t linear_logp_workspace_bytes(const LinearLogpParams& p, LogpTiling tiling) {
  return lm_head_workspace_bytes(rows_of(p.input, 0, clamped(tiling, p.input.num_tokens).room));
}

void linear_logp(const LinearLogpParams& p, LogpTiling tiling, const Launch& launch) {
  const LmHeadInput& in = p.input;
  tiling = clamped(tiling, in.num_tokens);
  for (std::int64_t begin = 0; begin < in.num_tokens; begin += tiling.room) {
    const std::int64_t left = in.num_tokens - begin;
    forward_rows("linear_logp", rows_of(in, begin, left < tiling.room ? left : tiling.room),
                 p.targets + begin, p.logprobs + begin,
                 p.entropy == nullptr ? nullptr : p.entropy + begin, launch);
  }
}

std::size_t linear_logp_bwd_workspace_bytes(const LinearLogpBwdParams& p, LogpTiling tiling) {
  return BwdWork(p, clamped(tiling, p.input.num_tokens), nullptr).num_bytes;
}

void linear_logp_bwd(const LinearLogpBwdParams& p, LogpTiling tiling, const Launch& launch) {
  constexpr const char* kOp = "linear_logp_bwd";
  const LmHeadInput& in = p.input;
  auto* const dw = static_cast<Bf16*>(p.dw);
  const std::int64_t known = in.num_tokens == 0 ? 0 : in.vocab_size;
  // The sum of no blocks: zeros.
  fold_blocks(kOp, launch, nullptr, 0, (p.num_rows - known) * in.in_dim, dw + known * in.in_dim,
              DType::kBf16);
  if (in.num_tokens == 0) return;
  tiling = clamped(tiling, in.num_tokens);
  const BwdWork work(p, tiling, launch.workspace);
  check_workspace(kOp, launch, work.num_bytes);
  Launch vocab = launch;
  vocab.workspace = work.vocab;
  vocab.workspace_bytes = work.vocab_bytes;
  turn_into_weight(kOp,
                   turned(p.weight, p.weight_row_stride, in.vocab_size, in.in_dim, in.vocab_size,
                          work.turned_weight),
                   launch);
  for (std::int64_t begin = 0; begin < in.num_tokens; begin += tiling.room) {
    const std::int64_t left = in.num_tokens - begin;
    const std::int64_t count = left < tiling.room ? left : tiling.room;
    const LmHeadInput rows = rows_of(in, begin, count);
    RowParams params{};
    params.targets = p.targets + begin;
    params.d_logprobs = p.d_logprobs + begin;
    params.d_entropy = p.d_entropy == nullptr ? nullptr : p.d_entropy + begin;
    params.entropy = work.entropy;
    params.dl = work.dl;
    params.dl_row_stride = work.dl_row_stride;
    params.vocab_size = in.vocab_size;
    params.rows = forward_rows(kOp, rows, params.targets, p.logprobs + begin,
                               p.d_entropy == nullptr ? nullptr : work.entropy, vocab);
    launch_kernel(kOp, launch, dl_kernel,
                  static_cast<unsigned>(count) * blocks_for(in.vocab_size, kBlockEntries),
                  kRowThreads, 0, params);
    linear_of_fresh({work.dl, work.turned_weight, static_cast<Bf16*>(p.dh) + begin * in.in_dim,
                     work.dl_row_stride, in.in_dim, count, in.vocab_size, in.in_dim, DType::kBf16,
                     DType::kBf16, 0},
                    launch);
    const bool is_last = begin + count == in.num_tokens;
    ChainedWgrad grad{};
    grad.op = {work.dl,
               rows.h,
               is_last ? static_cast<void*>(dw) : work.dw,
               work.dl_row_stride,
               in.h_row_stride,
               in.in_dim,
               count,
               in.in_dim,
               in.vocab_size,
               DType::kBf16,
               is_last ? DType::kBf16 : DType::kF32,
               0};
    grad.chain = tiling.chain;
    grad.onto = begin == 0 ? nullptr : work.dw;
    grad.onto_row_stride = in.in_dim;
    chained_wgrad(kOp, grad, work.wgrad, launch);
  }
}

}  // namespace tml::cuda
