// The gradient of one row's RMSNorm (contract: ops/rms_norm_bwd.h), shared by every op that has
// one.
#pragma once

#include "cpu/grad_columns.h"
#include "cpu/row_norm.h"

namespace tml::cpu::TML_ISA_NS {

// dx of a row is rstd * (e * weight - x^ * mean): all a later pass over its columns needs.
struct NormRow {
  float rstd;
  float mean;
};

// normed = round(x^) as the forward had it.
template <class T>
TML_INLINE Vec normed_part(Vec x, float rstd) {
  return round_through<T>(mul(x, set1(rstd)));
}

TML_INLINE Vec norm_dx(Vec x, Vec weight, Vec e, NormRow row) {
  const Vec scale = set1(row.rstd);
  return mul(scale, fma(mul(x, scale), set1(-row.mean), mul(e, weight)));
}

// upstream(i, count, normed, weight) gives e, the gradient of weight * normed, of elements
// [i, i + count), zero in the other lanes.
template <class T, class Upstream>
TML_INLINE NormRow norm_row(const T* x, const T* weight, std::int64_t dim, float eps,
                            const Upstream& upstream) {
  const float rstd = rstd_of(sum_of_squares(x, dim), dim, eps);
  Vec dots = zero();
  for (std::int64_t group = 0; group * 16 < dim; ++group) {
    const std::int64_t i = group * 16;
    const int count = group_width(group, dim);
    const Vec v = load_part(x + i, count), w = load_part(weight + i, count);
    const Vec e = upstream(i, count, normed_part<T>(v, rstd), w);
    dots = fma(mul(e, w), mul(v, set1(rstd)), dots);
  }
  return {rstd, hsum(dots) / static_cast<float>(dim)};
}

// emit(i, count, dx) for each part of the row, in fp32.
template <class T, class Upstream, class Emit>
TML_INLINE void norm_row_dx(const T* x, const T* weight, std::int64_t dim, NormRow row,
                            const Upstream& upstream, const Emit& emit) {
  for (std::int64_t group = 0; group * 16 < dim; ++group) {
    const std::int64_t i = group * 16;
    const int count = group_width(group, dim);
    const Vec v = load_part(x + i, count), w = load_part(weight + i, count);
    emit(i, count, norm_dx(v, w, upstream(i, count, normed_part<T>(v, row.rstd), w), row));
  }
}

}  // namespace tml::cpu::TML_ISA_NS
