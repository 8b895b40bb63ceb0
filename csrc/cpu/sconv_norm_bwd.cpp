// sconv_norm_bwd: whole rows per thread give dresidual, the gradient that enters the convolution;
// then runs of rows give dx, and whole columns the parameters.
#include "ops/sconv_norm_bwd.h"

#include "cpu/arena.h"
#include "cpu/cpu.h"
#include "cpu/norm_bwd.h"
#include "cpu/short_conv_bwd.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr std::int64_t kMinParallelElements = 32 << 10;

template <class T>
void sconv_norm_bwd_typed(const SconvNormBwdParams& p) {
  const auto* dnormed = static_cast<const T*>(p.dnormed);
  const auto* dsum = static_cast<const T*>(p.dsum);
  const auto* sum = static_cast<const T*>(p.sum);
  const auto* norm_weight = static_cast<const T*>(p.norm_weight);
  auto* dresidual = static_cast<T*>(p.dresidual);
  Neighbours* near;
  float* rstd;
  Arena arena(Scratch::kOp);
  arena.take(&near, p.num_tokens).take(&rstd, p.num_tokens).commit();
  fill_neighbours(p.cu_tokens, p.num_seqs, near);
  const ConvGrad<T> conv{
      dresidual, p.dim, static_cast<const T*>(p.x), p.x_row_stride, p.conv_weight, near, p.dim};
  const bool is_small = p.num_tokens * p.dim < kMinParallelElements;
  parallel(is_small ? 1 : p.num_threads, [&](int thread, int num_threads) {
    const Range tokens = split(p.num_tokens, thread, num_threads);
    for (std::int64_t t = tokens.begin; t < tokens.end; ++t) {
      const T* direct = dsum + t * p.dsum_row_stride;
      T* out = dresidual + t * p.dim;
      if (norm_weight == nullptr) {
        std::memcpy(out, direct, static_cast<std::size_t>(p.dim) * sizeof(T));
        continue;
      }
      const T* row = sum + t * p.sum_row_stride;
      const auto upstream = [&](std::int64_t i, int count, Vec, Vec) {
        return load_part(dnormed + t * p.dnormed_row_stride + i, count);
      };
      const NormRow stats = norm_row(row, norm_weight, p.dim, p.eps, upstream);
      rstd[t] = stats.rstd;
      norm_row_dx(row, norm_weight, p.dim, stats, upstream,
                  [&](std::int64_t i, int count, Vec value) {
                    store_part(out + i, add(load_part(direct + i, count), value), count);
                  });
    }
    team_barrier();
    conv.input(tokens, static_cast<T*>(p.dx), p.dim);
    const Range groups = split(p.dim / 16, thread, num_threads);
    conv.taps(groups, p.num_tokens, p.dconv);
    if (norm_weight == nullptr) return;
    grad_columns<1>(
        groups, p.num_tokens,
        [&](std::int64_t t, std::int64_t group, Vec(&total)[1]) {
          const Vec e = load_as_f32(dnormed + t * p.dnormed_row_stride + group * 16);
          const Vec x = load_as_f32(sum + t * p.sum_row_stride + group * 16);
          total[0] = fma(e, normed_part<T>(x, rstd[t]), total[0]);
        },
        [&](std::int64_t group, const Vec(&total)[1]) {
          store_rounded(static_cast<T*>(p.dnorm) + group * 16, total[0]);
        });
  });
}

}  // namespace

void sconv_norm_bwd(const SconvNormBwdParams& p) {
  if (p.dim == 0) return;
  if (p.dtype == DType::kF32) return TML_F32(sconv_norm_bwd, sconv_norm_bwd_typed<float>)(p);
  sconv_norm_bwd_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
