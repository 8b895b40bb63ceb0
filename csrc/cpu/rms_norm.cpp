// rms_norm: a thread owns whole rows; each is read twice, the second time from L1.
#include "ops/rms_norm.h"

#include "cpu/cpu.h"
#include "cpu/parallel.h"
#include "cpu/row_norm.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr std::int64_t kMinParallelElements = 96 << 10;

template <class T>
void rms_norm_typed(const RmsNormParams& p) {
  const auto* x = static_cast<const T*>(p.x);
  const auto* weight = static_cast<const T*>(p.weight);
  auto* y = static_cast<T*>(p.y);
  const bool is_small = p.num_rows * p.dim < kMinParallelElements;
  parallel(is_small ? 1 : p.num_threads, [&](int thread, int num_threads) {
    const Range rows = split(p.num_rows, thread, num_threads);
    const Vec divisor = set1(p.divisor);
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      T* out = y + row * p.y_row_stride;
      rms_norm_row(x + row * p.x_row_stride, weight, out, p.dim, p.eps);
      if (p.divisor != 1.0f)
        map_row(out, weight, out, p.dim, [&](Vec v, Vec) { return div(v, divisor); });
      if (p.use_gelu) map_row(out, weight, out, p.dim, [&](Vec v, Vec) { return gelu(v); });
    }
  });
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  if (p.num_rows == 0 || p.dim == 0) return;
  if (p.dtype == DType::kF32) return TML_F32(rms_norm, rms_norm_typed<float>)(p);
  rms_norm_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
