// The CPU launchers: one function an op, running the build of the active instruction set.
#pragma once

#include "cpu/op_list.h"

namespace tml::cpu {

#define TML_DECLARE(op, Params) void op(const Params& params);
TML_CPU_OPS(TML_DECLARE)
#undef TML_DECLARE

}  // namespace tml::cpu
