#include "core/isa.h"
#include "cpu/cpu.h"

namespace tml::cpu {

#define TML_DECLARE(op, Params)  \
  namespace scalar {             \
  void op(const Params& params); \
  }                              \
  namespace avx2 {               \
  void op(const Params& params); \
  }                              \
  namespace avx512 {             \
  void op(const Params& params); \
  }                              \
  namespace avx512bf16 {         \
  void op(const Params& params); \
  }
TML_CPU_OPS(TML_DECLARE)
#undef TML_DECLARE

#define TML_DISPATCH(op, Params)                                                    \
  void op(const Params& params) {                                                   \
    using Kernel = void (*)(const Params&);                                         \
    static constexpr Kernel kKernels[kNumIsas] = {scalar::op, avx2::op, avx512::op, \
                                                  avx512bf16::op};                  \
    kKernels[static_cast<int>(active_isa())](params);                               \
  }
TML_CPU_OPS(TML_DISPATCH)
#undef TML_DISPATCH

}  // namespace tml::cpu
