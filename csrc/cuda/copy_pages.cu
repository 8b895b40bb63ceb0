// copy_pages: sixteen bytes a thread, four of them in flight, neighbours side by side: the copy is
// bound by memory, and its start overlaps what runs before. Sixteen bytes are eight channels of one
// key (cuda/layout.h), so the clearing behind last_len is a choice a thread makes for all of them.
#include "cuda/cuda.h"
#include "cuda/launch.h"
#include "cuda/layout.h"
#include "cuda/ptx.h"

namespace tml::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 4;

TML_KERNEL(kThreads, 4) copy_pages_kernel(const TML_GRID_CONSTANT CopyPagesParams p) {
  grid_launch_dependents();
  grid_wait();
  const std::int64_t page_chunks = p.page_bytes / 16, block_chunks = 16 * p.head_dim;
  const std::int64_t chunks = p.num_pages * page_chunks;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const auto* const source = static_cast<const uint4*>(p.source);
  auto* const target = static_cast<uint4*>(p.target);
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       first < chunks; first += kBatch * stride) {
    uint4 values[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const std::int64_t at = first + i * stride;
      if (at >= chunks) break;
      const std::int64_t page = at / page_chunks, chunk = at % page_chunks;
      const std::int64_t key = page_key(chunk % block_chunks * 8, p.head_dim);
      const bool is_stale = page + 1 == p.num_pages && key >= p.last_len;
      const std::int64_t from = p.source_ids == nullptr ? page : p.source_ids[page];
      values[i] = is_stale ? uint4{0, 0, 0, 0} : source[from * page_chunks + chunk];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const std::int64_t at = first + i * stride;
      if (at >= chunks) break;
      const std::int64_t page = at / page_chunks;
      const std::int64_t to = p.target_ids == nullptr ? page : p.target_ids[page];
      target[to * page_chunks + at % page_chunks] = values[i];
    }
  }
}

}  // namespace

void copy_pages(const CopyPagesParams& p, const Launch& launch) {
  const std::int64_t chunks = p.num_pages * (p.page_bytes / 16);
  if (chunks == 0) return;
  const std::int64_t blocks = (chunks + kBatch * kThreads - 1) / (kBatch * kThreads);
  const std::int64_t most = static_cast<std::int64_t>(launch.num_sms) * 4;
  launch_kernel("copy_pages", launch, copy_pages_kernel,
                static_cast<unsigned>(blocks < most ? blocks : most), kThreads, 0, p);
}

}  // namespace tml::cuda
