// linear: which tile serves how many tokens (a matter of speed alone), and the packing of weights.
#include "cuda/cuda.h"
#include "cuda/linear.h"

namespace tml::cuda {
namespace {

constexpr int kPackThreads = 256;

// A thread owns sixteen bytes of the packed form: eight k of one output. It lets nothing start
// early: linear fetches packed weights before it waits.
TML_KERNEL(kPackThreads, 4) pack_weight_kernel(const TML_GRID_CONSTANT PackWeightParams p) {
  grid_wait();
  const std::int64_t k_blocks = blocks_of(p.in_dim);
  const std::int64_t chunks = packed_elements(p.out_dim, p.in_dim) / 8;
  const auto* w = static_cast<const Bf16*>(p.w);
  auto* packed = static_cast<Bf16*>(p.packed);
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
       i < chunks; i += static_cast<std::int64_t>(gridDim.x) * kPackThreads) {
    // Neighbouring threads read neighbouring k of one row.
    const std::int64_t n = i / (k_blocks * 8), k = i % (k_blocks * 8) * 8;
    alignas(16) Bf16 chunk[8];
#pragma unroll
    for (int j = 0; j < 8; ++j)
      chunk[j] = n < p.out_dim && k + j < p.in_dim ? w[n * p.w_row_stride + k + j] : Bf16{0};
    *reinterpret_cast<uint4*>(packed + weight_offset(n, k, k_blocks)) =
        *reinterpret_cast<const uint4*>(chunk);
  }
}

template <class Y>
void linear_typed(const LinearParams& p, bool are_static, const Launch& launch) {
  if (p.num_tokens <= 8) return linear_tiled<Y, 8, 1>(p, are_static, launch);
  if (p.num_tokens <= 16) return linear_tiled<Y, 16, 1>(p, are_static, launch);
  if (p.num_tokens <= 32) return linear_tiled<Y, 32, 1>(p, are_static, launch);
  if (p.num_tokens <= 128) return linear_tiled<Y, 64, 1>(p, are_static, launch);
  linear_tiled<Y, 256, 2>(p, are_static, launch);
}

void run(const LinearParams& p, bool are_static, const Launch& launch) {
  if (p.num_tokens == 0 || p.out_dim == 0) return;
  if (p.y_dtype == DType::kF32) return linear_typed<float>(p, are_static, launch);
  linear_typed<Bf16>(p, are_static, launch);
}

}  // namespace

void linear(const LinearParams& p, const Launch& launch) { run(p, true, launch); }
void linear_of_fresh(const LinearParams& p, const Launch& launch) { run(p, false, launch); }

void pack_weight(const PackWeightParams& p, const Launch& launch) {
  const std::int64_t chunks = packed_elements(p.out_dim, p.in_dim) / 8;
  if (chunks == 0) return;
  const std::int64_t blocks = (chunks + kPackThreads - 1) / kPackThreads;
  const std::int64_t most = static_cast<std::int64_t>(launch.num_sms) * 8;
  launch_kernel("pack_weight", launch, pack_weight_kernel,
                static_cast<unsigned>(blocks < most ? blocks : most), kPackThreads, 0, p);
}

}  // namespace tml::cuda
