// The CPU launchers: one function an op, running the build of the active instruction set.
#pragma once

#include "cpu/op_list.h"

namespace tml::cpu {

#define TML_DECLARE(op, Params) void op(const Params& params);
TML_CPU_OPS(TML_DECLARE)

// The BF16 level differs from the one below in the products of bf16 alone: its fp32 kernels are the
// other's.
#if defined(TML_ISA_LEVEL) && TML_ISA_LEVEL == 3
namespace avx512 {
TML_CPU_OPS(TML_DECLARE)
}
#define TML_F32(op, ...) avx512::op
#else
#define TML_F32(op, ...) __VA_ARGS__
#endif
#undef TML_DECLARE

}  // namespace tml::cpu
