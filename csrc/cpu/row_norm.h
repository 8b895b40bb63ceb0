// The RMSNorm of one row, shared by every op that ends in one (contract: ops/rms_norm.h).
#pragma once

#include "cpu/vec.h"

namespace tml::cpu::TML_ISA_NS {

// 1 / sqrt(sum / dim + eps) from the sixteen lanes of a sum of squares.
TML_INLINE float rstd_of(Vec squares, std::int64_t dim, float eps) {
  return 1.0f / __builtin_sqrtf(hsum(squares) / static_cast<float>(dim) + eps);
}

template <class T>
TML_INLINE Vec sum_of_squares(const T* x, std::int64_t dim) {
  Vec squares = zero();
  std::int64_t i = 0;
  for (; i + 16 <= dim; i += 16) {
    const Vec v = load_as_f32(x + i);
    squares = fma(v, v, squares);
  }
  if (i < dim) {
    const Vec v = load_first_as_f32(x + i, static_cast<int>(dim - i));
    squares = fma(v, v, squares);
  }
  return squares;
}

// body(x, weight) -> the sixteen fp32 values to round and store, for each part of a row. x, weight
// and y may be the same memory.
template <class T, class Body>
TML_INLINE void map_row(const T* x, const T* weight, T* y, std::int64_t dim, const Body& body) {
  std::int64_t i = 0;
  for (; i + 16 <= dim; i += 16)
    store_rounded(y + i, body(load_as_f32(x + i), load_as_f32(weight + i)));
  if (i < dim) {
    const int rest = static_cast<int>(dim - i);
    store_first_rounded(
        y + i, body(load_first_as_f32(x + i, rest), load_first_as_f32(weight + i, rest)), rest);
  }
}

// y = round(weight * round(x * rstd))
template <class T>
TML_INLINE void scale_row(const T* x, const T* weight, T* y, std::int64_t dim, float rstd) {
  const Vec scale = set1(rstd);
  map_row(x, weight, y, dim, [&](Vec v, Vec w) { return mul(w, round_through<T>(mul(v, scale))); });
}

template <class T>
TML_INLINE void rms_norm_row(const T* x, const T* weight, T* y, std::int64_t dim, float eps) {
  scale_row(x, weight, y, dim, rstd_of(sum_of_squares(x, dim), dim, eps));
}

}  // namespace tml::cpu::TML_ISA_NS
