// rms_norm_bwd: first whole rows per thread (dx), then whole columns per thread (dweight), which
// read x and dy once more and need only each row's rstd.
#include "ops/rms_norm_bwd.h"

#include "core/memory.h"
#include "cpu/cpu.h"
#include "cpu/norm_bwd.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr std::int64_t kMinParallelElements = 48 << 10;

// d gelu(x) / dx = (1 + erf(x / sqrt 2)) / 2 + x e^(-x^2 / 2) / sqrt(2 pi)
TML_INLINE Vec gelu_slope(Vec x) {
  const Vec half = set1(0.5f);
  const Vec cdf = fma(half, erf(mul(x, set1(0.70710678118654752f))), half);
  const Vec density = mul(exp(mul(mul(x, x), set1(-0.5f))), set1(0.39894228040143268f));
  return fma(x, density, cdf);
}

template <class T>
void rms_norm_bwd_typed(const RmsNormBwdParams& p) {
  const auto* dy = static_cast<const T*>(p.dy);
  const auto* x = static_cast<const T*>(p.x);
  const auto* weight = static_cast<const T*>(p.weight);
  auto* dx = static_cast<T*>(p.dx);
  auto* rstd = static_cast<float*>(
      scratch(Scratch::kOp, static_cast<std::size_t>(p.num_rows) * sizeof(float)));
  const bool has_divisor = p.divisor != 1.0f;
  const Vec divisor = set1(p.divisor);
  const auto upstream = [&](std::int64_t row, std::int64_t i, int count, Vec normed, Vec w) {
    Vec e = load_part(dy + row * p.dy_row_stride + i, count);
    if (p.use_gelu) {
      Vec y = round_through<T>(mul(w, normed));
      if (has_divisor) y = round_through<T>(div(y, divisor));
      e = mul(e, gelu_slope(y));
    }
    return has_divisor ? div(e, divisor) : e;
  };
  const bool is_small = p.num_rows * p.dim < kMinParallelElements;
  parallel(is_small ? 1 : p.num_threads, [&](int thread, int num_threads) {
    const Range rows = split(p.num_rows, thread, num_threads);
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      const T* in = x + row * p.x_row_stride;
      const auto of_row = [&](std::int64_t i, int count, Vec normed, Vec w) {
        return upstream(row, i, count, normed, w);
      };
      const NormRow stats = norm_row(in, weight, p.dim, p.eps, of_row);
      rstd[row] = stats.rstd;
      norm_row_dx(in, weight, p.dim, stats, of_row, [&](std::int64_t i, int count, Vec value) {
        store_part(dx + row * p.dx_row_stride + i, value, count);
      });
    }
    team_barrier();
    grad_columns<1>(
        split(ceil_div(p.dim, 16), thread, num_threads), p.num_rows,
        [&](std::int64_t row, std::int64_t group, Vec(&sum)[1]) {
          const std::int64_t i = group * 16;
          const int count = group_width(group, p.dim);
          const Vec normed =
              normed_part<T>(load_part(x + row * p.x_row_stride + i, count), rstd[row]);
          const Vec e = upstream(row, i, count, normed, load_part(weight + i, count));
          sum[0] = fma(e, normed, sum[0]);
        },
        [&](std::int64_t group, const Vec(&total)[1]) {
          store_part(static_cast<T*>(p.dweight) + group * 16, total[0], group_width(group, p.dim));
        });
  });
}

}  // namespace

void rms_norm_bwd(const RmsNormBwdParams& p) {
  if (p.dim == 0) return;
  if (p.dtype == DType::kF32) return TML_F32(rms_norm_bwd, rms_norm_bwd_typed<float>)(p);
  rms_norm_bwd_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
