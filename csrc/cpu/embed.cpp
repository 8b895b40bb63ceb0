// embed: a thread owns whole rows; a gathered row is read twice, the second time from L1.
#include "ops/embed.h"

#include "cpu/cpu.h"
#include "cpu/parallel.h"
#include "cpu/row_norm.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr std::int64_t kMinParallelElements = 96 << 10;

template <class T>
void embed_typed(const EmbedParams& p) {
  const auto* table = static_cast<const T*>(p.table);
  const auto* weight = static_cast<const T*>(p.weight);
  auto* y = static_cast<T*>(p.y);
  const bool is_small = p.num_tokens * p.dim < kMinParallelElements;
  parallel(is_small ? 1 : p.num_threads, [&](int thread, int num_threads) {
    const Range tokens = split(p.num_tokens, thread, num_threads);
    for (std::int64_t t = tokens.begin; t < tokens.end; ++t)
      rms_norm_row(table + p.ids[t] * p.table_row_stride, weight, y + t * p.y_row_stride, p.dim,
                   p.eps);
  });
}

}  // namespace

void embed(const EmbedParams& p) {
  if (p.num_tokens == 0 || p.dim == 0) return;
  if (p.dtype == DType::kF32) return TML_F32(embed, embed_typed<float>)(p);
  embed_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
