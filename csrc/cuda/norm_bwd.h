// Gradients of rows in the order of the contract (ops/rms_norm_bwd.h), so with the CPU's bits:
// sixteen threads hold a row, thread j its elements j, j + 16, ..., and add them by halving;
// parameters are summed a column to a thread, block of kGradBlock tokens by block, then the blocks
// in ascending order. A block of threads holds kGradRows rows, or kRowThreads columns.
#pragma once

#include "core/contract.h"
#include "core/dtype.h"
#include "cuda/row.h"

namespace tml::cuda {

inline constexpr int kGradRows = kRowThreads / contract::kLanes;

TML_DEVICE void put(float* p, float x) { *p = x; }
TML_DEVICE void put(std::uint16_t* p, float x) {
  *p = static_cast<std::uint16_t>(pack_bf16(x, 0.0f));
}

inline std::int64_t grad_blocks(std::int64_t num_tokens) {
  return (num_tokens + contract::kGradBlock - 1) / contract::kGradBlock;
}
inline unsigned blocks_for(std::int64_t count, std::int64_t per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

// out[i] = the sum over b, ascending from 0, of partial[b * count + i], rounded to `dtype`.
void fold_blocks(const char* op, const Launch& launch, const float* partial,
                 std::int64_t num_blocks, std::int64_t count, void* out, DType dtype);

// dx of a row is rstd * (e * weight - x^ * mean): all that its columns need.
struct NormRow {
  float rstd, mean;
};

TML_DEVICE int lane_of_row() { return static_cast<int>(threadIdx.x % contract::kLanes); }
// The row of these sixteen threads. Where it does not exist they do the last one's work, so that
// every lane of a warp takes part in its sums, and must not store.
TML_DEVICE std::int64_t own_row() {
  return static_cast<std::int64_t>(blockIdx.x) * kGradRows + threadIdx.x / contract::kLanes;
}

TML_DEVICE float lanes_sum(float x) {
#pragma unroll
  for (int mask = contract::kLanes / 2; mask > 0; mask /= 2)
    x = __fadd_rn(x, __shfl_xor_sync(kFullMask, x, mask));
  return x;
}

template <class T>
TML_DEVICE float normed_value(float x, float rstd) {
  return round_as<T>(__fmul_rn(x, rstd));
}
TML_DEVICE float norm_dx(float x, float weight, float e, NormRow row) {
  return __fmul_rn(row.rstd, __fmaf_rn(__fmul_rn(x, row.rstd), -row.mean, __fmul_rn(e, weight)));
}

// upstream(i, normed, weight) -> e, the gradient of weight * normed at element i.
template <class T, class Upstream>
TML_DEVICE NormRow norm_row(const T* x, const T* weight, std::int64_t dim, float eps,
                            const Upstream& upstream) {
  float squares = 0.0f, dots = 0.0f;
#pragma unroll 8
  for (std::int64_t i = lane_of_row(); i < dim; i += contract::kLanes) {
    const float v = as_float(x[i]);
    squares = __fmaf_rn(v, v, squares);
  }
  const float rstd = rstd_of(lanes_sum(squares), dim, eps);
#pragma unroll 4
  for (std::int64_t i = lane_of_row(); i < dim; i += contract::kLanes) {
    const float v = as_float(x[i]), w = as_float(weight[i]);
    const float e = upstream(i, normed_value<T>(v, rstd), w);
    dots = __fmaf_rn(__fmul_rn(e, w), __fmul_rn(v, rstd), dots);
  }
  return {rstd, __fdiv_rn(lanes_sum(dots), static_cast<float>(dim))};
}

// emit(i, dx) for the elements of this thread, in fp32.
template <class T, class Upstream, class Emit>
TML_DEVICE void norm_row_dx(const T* x, const T* weight, std::int64_t dim, NormRow row,
                            const Upstream& upstream, const Emit& emit) {
#pragma unroll 4
  for (std::int64_t i = lane_of_row(); i < dim; i += contract::kLanes) {
    const float v = as_float(x[i]), w = as_float(weight[i]);
    emit(i, norm_dx(v, w, upstream(i, normed_value<T>(v, row.rstd), w), row));
  }
}

// body(column, first token, end) of this thread's column in this block's block of tokens, whose
// number is then `block`; grids are grad_columns_grid(num_tokens, dim).
inline unsigned grad_columns_grid(std::int64_t num_tokens, std::int64_t dim) {
  return static_cast<unsigned>(grad_blocks(num_tokens)) * blocks_for(dim, kRowThreads);
}
template <class Body>
TML_DEVICE void grad_columns(std::int64_t num_tokens, std::int64_t dim, const Body& body) {
  const std::int64_t chunks = (dim + kRowThreads - 1) / kRowThreads;
  const std::int64_t block = blockIdx.x / chunks;
  const std::int64_t column = blockIdx.x % chunks * kRowThreads + threadIdx.x;
  if (column >= dim) return;
  const std::int64_t begin = block * contract::kGradBlock, left = num_tokens - begin;
  body(block, column, begin, begin + (left < contract::kGradBlock ? left : contract::kGradBlock));
}

// add(token) for the tokens from `begin` on that match, ascending, in every thread of the block;
// end_block() after those of each kGradBlock. `words` is kRowThreads / 32 of shared memory.
template <class Matches, class Add, class EndBlock>
TML_DEVICE void each_match(std::int64_t begin, std::int64_t num_tokens, unsigned* words,
                           const Matches& matches, const Add& add, const EndBlock& end_block) {
  for (std::int64_t first = begin / contract::kGradBlock * contract::kGradBlock; first < num_tokens;
       first += kRowThreads) {
    const std::int64_t token = first + threadIdx.x;
    const unsigned word =
        __ballot_sync(kFullMask, token >= begin && token < num_tokens && matches(token));
    if (threadIdx.x % 32 == 0) words[threadIdx.x / 32] = word;
    __syncthreads();
    for (int w = 0; w < kRowThreads / 32; ++w)
      for (unsigned left = words[w]; left != 0; left &= left - 1)
        add(first + w * 32 + __ffs(static_cast<int>(left)) - 1);
    __syncthreads();
    if ((first + kRowThreads) % contract::kGradBlock == 0 || first + kRowThreads >= num_tokens)
      end_block();
  }
}

}  // namespace tml::cuda
