// embed, dmel_embed: a block owns a row. dmel_embed adds its channels' rows in ascending order,
// eight columns to a thread, so that the loads of all channels are independent; the row is then
// normalised where it was written.
#include "cuda/cuda.h"
#include "cuda/row.h"

namespace tml::cuda {
namespace {

struct EmbedRows {
  EmbedParams op;
  bool is_aligned;
};
struct DmelRows {
  DmelEmbedParams op;
  bool is_aligned;
};

template <class T>
TML_KERNEL(kRowThreads, 4)
embed_kernel(const TML_GRID_CONSTANT EmbedRows p) {
  grid_launch_dependents();
  grid_wait();
  const EmbedParams& op = p.op;
  const std::int64_t row = blockIdx.x;
  rms_norm_row<T>(static_cast<const T*>(op.table) + op.ids[row] * op.table_row_stride,
                  static_cast<const T*>(op.weight), static_cast<T*>(op.y) + row * op.y_row_stride,
                  op.dim, op.eps, p.is_aligned, reinterpret_cast<float*>(shared_memory()),
                  [](float v) { return v; });
}

template <class T>
TML_KERNEL(kRowThreads, 4)
dmel_embed_kernel(const TML_GRID_CONSTANT DmelRows p) {
  grid_launch_dependents();
  grid_wait();
  const DmelEmbedParams& op = p.op;
  const std::int64_t row = blockIdx.x;
  const std::int32_t* bins = op.bins + row * op.num_channels;
  T* const y = static_cast<T*>(op.y) + row * op.y_row_stride;
  each_group(op.dim, [&](std::int64_t i, std::int64_t count) {
    const T* table = static_cast<const T*>(op.table) + i;
    float sum[8] = {};
#pragma unroll 4
    for (std::int64_t c = 0; c < op.num_channels; ++c) {
      float v[8];
      load_eight(v, table + (c * op.num_levels + bins[c]) * op.table_row_stride, count,
                 p.is_aligned);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j] = __fadd_rn(sum[j], v[j]);
    }
    store_eight(y + i, sum, count, p.is_aligned);
  });
  rms_norm_row<T>(y, static_cast<const T*>(op.weight), y, op.dim, op.eps, p.is_aligned,
                  reinterpret_cast<float*>(shared_memory()), [](float v) { return v; });
}

template <class T, class Params>
bool is_aligned(const Params& p) {
  return is_row_aligned(static_cast<const T*>(p.table), p.table_row_stride) &&
         is_row_aligned(static_cast<const T*>(p.y), p.y_row_stride) &&
         is_row_aligned(static_cast<const T*>(p.weight), 16);
}

template <class T>
void embed_typed(const EmbedParams& p, const Launch& launch) {
  launch_kernel("embed", launch, embed_kernel<T>, static_cast<unsigned>(p.num_tokens), kRowThreads,
                kRowSharedBytes, EmbedRows{p, is_aligned<T>(p)});
}

template <class T>
void dmel_embed_typed(const DmelEmbedParams& p, const Launch& launch) {
  launch_kernel("dmel_embed", launch, dmel_embed_kernel<T>, static_cast<unsigned>(p.num_frames),
                kRowThreads, kRowSharedBytes, DmelRows{p, is_aligned<T>(p)});
}

}  // namespace

void embed(const EmbedParams& p, const Launch& launch) {
  if (p.num_tokens == 0 || p.dim == 0) return;
  if (p.dtype == DType::kF32) return embed_typed<float>(p, launch);
  embed_typed<std::uint16_t>(p, launch);
}

void dmel_embed(const DmelEmbedParams& p, const Launch& launch) {
  if (p.num_frames == 0 || p.dim == 0) return;
  if (p.dtype == DType::kF32) return dmel_embed_typed<float>(p, launch);
  dmel_embed_typed<std::uint16_t>(p, launch);
}

}  // namespace tml::cuda
