// embed_bwd: tokens are sorted by id (counting sort, so they stay ascending within an id); then a
// thread owns columns and walks the sorted tokens, each row of the table written once. What a
// token's normalisation gives back is recomputed per column from two numbers a token.
#include "ops/embed_bwd.h"

#include "cpu/arena.h"
#include "cpu/cpu.h"
#include "cpu/norm_bwd.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr std::int64_t kMinParallelElements = 48 << 10;
// Columns summed together while the tokens of a row pass.
constexpr std::int64_t kRunGroups = 8;

// order: the tokens by ascending id, then ascending. starts is a workspace of num_ids + 1.
void sort_tokens(const EmbedBwdParams& p, std::int32_t* starts, std::int32_t* order) {
  std::memset(starts, 0, static_cast<std::size_t>(p.num_ids + 1) * sizeof(*starts));
  for (std::int64_t t = 0; t < p.num_tokens; ++t) ++starts[p.ids[t] + 1];
  for (std::int64_t id = 0; id < p.num_ids; ++id) starts[id + 1] += starts[id];
  for (std::int64_t t = 0; t < p.num_tokens; ++t)
    order[starts[p.ids[t]]++] = static_cast<std::int32_t>(t);
}

template <class T>
void embed_bwd_typed(const EmbedBwdParams& p) {
  const auto* dy = static_cast<const T*>(p.dy);
  const auto* table = static_cast<const T*>(p.table);
  const auto* weight = static_cast<const T*>(p.weight);
  std::int32_t *starts, *order;
  NormRow* stats;
  Arena arena(Scratch::kOp);
  arena.take(&starts, p.num_ids + 1).take(&order, p.num_tokens).take(&stats, p.num_tokens).commit();
  sort_tokens(p, starts, order);
  const auto row_of = [&](std::int64_t t) { return table + p.ids[t] * p.table_row_stride; };
  const bool is_small = p.num_tokens * p.dim < kMinParallelElements;
  parallel(is_small ? 1 : p.num_threads, [&](int thread, int num_threads) {
    const Range tokens = split(p.num_tokens, thread, num_threads);
    for (std::int64_t t = tokens.begin; t < tokens.end; ++t)
      stats[t] =
          norm_row(row_of(t), weight, p.dim, p.eps, [&](std::int64_t i, int count, Vec, Vec) {
            return load_part(dy + t * p.dy_row_stride + i, count);
          });
    team_barrier();
    const Range groups = split(ceil_div(p.dim, 16), thread, num_threads);
    grad_columns<1>(
        groups, p.num_tokens,
        [&](std::int64_t t, std::int64_t group, Vec(&sum)[1]) {
          const int count = group_width(group, p.dim);
          const Vec e = load_part(dy + t * p.dy_row_stride + group * 16, count);
          const Vec x = load_part(row_of(t) + group * 16, count);
          sum[0] = fma(e, normed_part<T>(x, stats[t].rstd), sum[0]);
        },
        [&](std::int64_t group, const Vec(&total)[1]) {
          store_part(static_cast<T*>(p.dweight) + group * 16, total[0], group_width(group, p.dim));
        });
    for (std::int64_t first = groups.begin; first < groups.end; first += kRunGroups) {
      const std::int64_t last = std::min(first + kRunGroups, groups.end);
      for (std::int64_t i = 0; i < p.num_tokens;) {
        const std::int64_t id = p.ids[order[i]];
        Vec total[kRunGroups];
        for (Vec& sum : total) sum = zero();
        while (i < p.num_tokens && p.ids[order[i]] == id) {
          const std::int64_t block = order[i] / contract::kGradBlock;
          Vec sums[kRunGroups];
          for (Vec& sum : sums) sum = zero();
          for (; i < p.num_tokens && p.ids[order[i]] == id &&
                 order[i] / contract::kGradBlock == block;
               ++i) {
            const std::int64_t t = order[i];
            for (std::int64_t group = first; group < last; ++group) {
              const int count = group_width(group, p.dim);
              const std::int64_t column = group * 16;
              Vec& sum = sums[group - first];
              sum =
                  add(sum, norm_dx(load_part(row_of(t) + column, count),
                                   load_part(weight + column, count),
                                   load_part(dy + t * p.dy_row_stride + column, count), stats[t]));
            }
          }
          for (std::int64_t g = 0; g < last - first; ++g) total[g] = add(total[g], sums[g]);
        }
        T* out = static_cast<T*>(p.dtable) + id * p.dim;
        for (std::int64_t group = first; group < last; ++group)
          store_part(out + group * 16, total[group - first], group_width(group, p.dim));
      }
    }
  });
}

}  // namespace

void embed_bwd(const EmbedBwdParams& p) {
  if (p.dim == 0) return;
  if (p.dtype == DType::kF32) return TML_F32(embed_bwd, embed_bwd_typed<float>)(p);
  embed_bwd_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
