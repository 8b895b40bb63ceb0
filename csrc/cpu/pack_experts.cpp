// pack_experts: one panel at a time, threads over all panels of all experts.
#include "cpu/cpu.h"
#include "cpu/panel_rows.h"
#include "cpu/parallel.h"
#include "ops/moe.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

constexpr std::int64_t kPanel = contract::kPanel;

// One panel from 32 rows of in_dim elements; a null row is zeros.
template <class T>
void pack_panel(KStep* out, const T* const (&rows)[kPanel], std::int64_t in_dim) {
  const std::int64_t num_steps = sizeof(T) == 2 ? (in_dim + 1) / 2 : in_dim;
  for (std::int64_t row = 0; row < kPanel; ++row)
    if (rows[row] == nullptr)
      for (std::int64_t k = 0; k < num_steps; ++k) out[k * kPanel + row] = 0;
  for (std::int64_t k = 0; k < num_steps; ++k)
    for (std::int64_t row = 0; row < kPanel; ++row)
      if (rows[row] != nullptr) out[k * kPanel + row] = k_step(rows[row], k, in_dim);
}

template <class T>
void pack_experts_typed(const PackExpertsParams& p) {
  const std::int64_t panels13 = ceil_div(p.width, 16), panels2 = ceil_div(p.hidden, kPanel);
  const std::int64_t steps13 = num_k_steps(p.dtype, p.hidden);
  const std::int64_t steps2 = num_k_steps(p.dtype, p.width);
  const auto* gate_up = static_cast<const T*>(p.gate_up);
  const auto* down = static_cast<const T*>(p.down);
  parallel(p.num_threads, [&](int thread, int num_threads) {
    const T* rows[kPanel];
    const Range own13 = split(p.num_matrices * panels13, thread, num_threads);
    for (std::int64_t item = own13.begin; item < own13.end; ++item) {
      const std::int64_t first = item % panels13 * 16;
      const T* matrix = gate_up + item / panels13 * 2 * p.width * p.hidden;
      for (std::int64_t i = 0; i < 16; ++i) {
        const bool real = first + i < p.width;
        rows[i] = real ? matrix + (first + i) * p.hidden : nullptr;
        rows[16 + i] = real ? matrix + (p.width + first + i) * p.hidden : nullptr;
      }
      pack_panel(static_cast<KStep*>(p.w13) + item * steps13 * kPanel, rows, p.hidden);
    }
    const Range own2 = split(p.num_matrices * panels2, thread, num_threads);
    for (std::int64_t item = own2.begin; item < own2.end; ++item) {
      const std::int64_t first = item % panels2 * kPanel;
      const T* matrix = down + item / panels2 * p.hidden * p.width;
      for (std::int64_t i = 0; i < kPanel; ++i)
        rows[i] = first + i < p.hidden ? matrix + (first + i) * p.width : nullptr;
      pack_panel(static_cast<KStep*>(p.w2) + item * steps2 * kPanel, rows, p.width);
    }
  });
}

}  // namespace

void pack_experts(const PackExpertsParams& p) {
  if (p.dtype == DType::kF32) return TML_F32(pack_experts, pack_experts_typed<float>)(p);
  pack_experts_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
