// router_bwd: a thread takes a token's few terms; then a block takes a row of dx, and a block an
// output's row of dw (kRowThreads * kOwnColumns of its columns), for which it walks the tokens that
// chose it in ascending order. The order of the sums is that of csrc/ops: the CPU's bits for the
// same logits.
#include "cuda/cuda.h"
#include "cuda/norm_bwd.h"
#include "cuda/router_terms.h"

namespace tml::cuda {
namespace {

constexpr int kOwnColumns = 4;  // of a thread, kRowThreads apart
constexpr std::int64_t kBlockColumns = kRowThreads * kOwnColumns;

struct GradParams {
  RouterBwdParams op;
  float* dl;          // [num_outputs, num_tokens]: where an output has a gradient
  float* scale_part;  // [num_tokens]
  float* partial;     // [blocks]

  TML_DEVICE std::int32_t num_outputs() const { return op.num_experts + op.num_shared; }
  TML_DEVICE std::int32_t num_chosen() const { return op.top_k + op.num_shared; }
  TML_DEVICE std::int32_t chosen(std::int64_t token, std::int32_t i) const {
    return i < op.top_k ? op.expert_ids[token * op.top_k + i] : op.num_experts + i - op.top_k;
  }
  TML_DEVICE float grad_of(std::int64_t token, std::int32_t i) const {
    return i < op.top_k ? op.dweights[token * op.top_k + i]
                        : op.dgammas[token * op.num_shared + i - op.top_k];
  }
};

TML_KERNEL(kRowThreads, 2) router_dl_kernel(const TML_GRID_CONSTANT GradParams p) {
  grid_launch_dependents();
  grid_wait();
  const RouterBwdParams& op = p.op;
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (token >= op.num_tokens) return;
  const float* const logits = op.logits + token * p.num_outputs();
  // Terms are made again each time rather than kept: as many as there are do not fit registers.
  const auto ls_of = [&](std::int32_t i) { return log_sigmoid(logits[p.chosen(token, i)]); };
  float top = ls_of(0);
  for (std::int32_t i = 1; i < p.num_chosen(); ++i) top = ls_of(i) > top ? ls_of(i) : top;
  const auto term_of = [&](std::int32_t i) { return exp_poly(__fadd_rn(ls_of(i), -top)); };
  float sum = 0.0f, mean = 0.0f;
  for (std::int32_t i = 0; i < p.num_chosen(); ++i) sum = __fadd_rn(sum, term_of(i));
  for (std::int32_t i = 0; i < p.num_chosen(); ++i)
    mean = __fmaf_rn(__fdiv_rn(term_of(i), sum), p.grad_of(token, i), mean);
  p.scale_part[token] = mean;
  if (op.dlogits != nullptr)
    for (std::int32_t n = 0; n < p.num_outputs(); ++n)
      p.dl[n * op.num_tokens + token] = op.dlogits[token * p.num_outputs() + n];
  for (std::int32_t i = 0; i < p.num_chosen(); ++i) {
    const std::int32_t n = p.chosen(token, i);
    const float scaled = __fmul_rn(op.scale, __fdiv_rn(term_of(i), sum));
    const float grad = __fdiv_rn(__fmul_rn(scaled, __fadd_rn(p.grad_of(token, i), -mean)),
                                 __fadd_rn(1.0f, exp_poly(logits[n])));
    float* const out = p.dl + n * op.num_tokens + token;
    *out = op.dlogits != nullptr ? __fadd_rn(*out, grad) : grad;
  }
}

TML_KERNEL(kRowThreads, 2) router_dscale_kernel(const TML_GRID_CONSTANT GradParams p) {
  grid_launch_dependents();
  grid_wait();
  const std::int64_t block = static_cast<std::int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  const std::int64_t begin = block * contract::kGradBlock;
  float sum = 0.0f;
  for (std::int64_t t = begin; t < p.op.num_tokens && t < begin + contract::kGradBlock; ++t)
    sum = __fadd_rn(sum, p.scale_part[t]);
  if (begin < p.op.num_tokens) p.partial[block] = sum;
}

template <class T>
TML_KERNEL(kRowThreads, 4)
router_dx_kernel(const TML_GRID_CONSTANT GradParams p) {
  grid_launch_dependents();
  grid_wait();
  const RouterBwdParams& op = p.op;
  const std::int64_t token = blockIdx.x;
  const bool has_all = op.dlogits != nullptr;
  const std::int32_t count = has_all ? p.num_outputs() : p.num_chosen();
  T* const dx = static_cast<T*>(op.dx) + token * op.in_dim;
  for (std::int64_t column = threadIdx.x; column < op.in_dim; column += kRowThreads) {
    float sum = 0.0f;
#pragma unroll 4
    for (std::int32_t i = 0; i < count; ++i) {
      const std::int64_t n = has_all ? i : p.chosen(token, i);
      sum = __fmaf_rn(p.dl[n * op.num_tokens + token], op.weight[n * op.in_dim + column], sum);
    }
    put(dx + column, sum);
  }
}

template <class T>
TML_KERNEL(kRowThreads, 4)
router_dw_kernel(const TML_GRID_CONSTANT GradParams p) {
  grid_launch_dependents();
  grid_wait();
  const RouterBwdParams& op = p.op;
  auto* const words = reinterpret_cast<unsigned*>(shared_memory());
  const std::int64_t chunks = (op.in_dim + kBlockColumns - 1) / kBlockColumns;
  const std::int64_t n = blockIdx.x / chunks;
  const std::int64_t column = blockIdx.x % chunks * kBlockColumns + threadIdx.x;
  const bool is_every = op.dlogits != nullptr || n >= op.num_experts;
  const T* const x = static_cast<const T*>(op.x);
  float sum[kOwnColumns] = {}, total[kOwnColumns] = {};
  each_match(
      0, op.num_tokens, words,
      [&](std::int64_t t) {
        bool is_chosen = is_every;
        for (std::int32_t i = 0; i < op.top_k && !is_chosen; ++i)
          is_chosen = op.expert_ids[t * op.top_k + i] == n;
        return is_chosen;
      },
      [&](std::int64_t t) {
        const float grad = p.dl[n * op.num_tokens + t];
#pragma unroll
        for (int j = 0; j < kOwnColumns; ++j) {
          const std::int64_t c = column + j * kRowThreads;
          if (c < op.in_dim) sum[j] = __fmaf_rn(grad, as_float(x[t * op.x_row_stride + c]), sum[j]);
        }
      },
      [&] {
#pragma unroll
        for (int j = 0; j < kOwnColumns; ++j) {
          total[j] = __fadd_rn(total[j], sum[j]);
          sum[j] = 0.0f;
        }
      });
#pragma unroll
  for (int j = 0; j < kOwnColumns; ++j) {
    const std::int64_t c = column + j * kRowThreads;
    if (c < op.in_dim) op.dw[n * op.in_dim + c] = total[j];
  }
}

GradParams parts_of(const RouterBwdParams& p, void* base, std::size_t* num_bytes) {
  Workspace parts(base);
  GradParams out{p, nullptr, nullptr, nullptr};
  out.dl = parts.take<float>((p.num_experts + p.num_shared) * p.num_tokens);
  out.scale_part = parts.take<float>(p.num_tokens);
  out.partial = parts.take<float>(grad_blocks(p.num_tokens));
  *num_bytes = parts.used();
  return out;
}

template <class T>
void router_bwd_typed(const GradParams& p, const Launch& launch) {
  const RouterBwdParams& op = p.op;
  if (op.num_tokens > 0) {
    launch_kernel("router_bwd", launch, router_dl_kernel, blocks_for(op.num_tokens, kRowThreads),
                  kRowThreads, 0, p);
    launch_kernel("router_bwd", launch, router_dscale_kernel,
                  blocks_for(grad_blocks(op.num_tokens), kRowThreads), kRowThreads, 0, p);
    launch_kernel("router_bwd", launch, router_dx_kernel<T>, static_cast<unsigned>(op.num_tokens),
                  kRowThreads, 0, p);
  }
  const auto outputs = static_cast<unsigned>(op.num_experts + op.num_shared);
  launch_kernel("router_bwd", launch, router_dw_kernel<T>,
                outputs * blocks_for(op.in_dim, kBlockColumns), kRowThreads,
                kRowThreads / 32 * sizeof(unsigned), p);
}

}  // namespace

std::size_t router_bwd_workspace_bytes(const RouterBwdParams& p) {
  std::size_t num_bytes = 0;
  parts_of(p, nullptr, &num_bytes);
  return num_bytes;
}

void router_bwd(const RouterBwdParams& p, const Launch& launch) {
  std::size_t num_bytes = 0;
  const GradParams params = parts_of(p, launch.workspace, &num_bytes);
  check_workspace("router_bwd", launch, num_bytes);
  if (p.in_dim > 0) {
    if (p.dtype == DType::kF32)
      router_bwd_typed<float>(params, launch);
    else
      router_bwd_typed<std::uint16_t>(params, launch);
  }
  fold_blocks("router_bwd", launch, params.partial, grad_blocks(p.num_tokens), 1, p.dscale,
              DType::kF32);
}

}  // namespace tml::cuda
