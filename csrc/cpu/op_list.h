// Every op with a CPU kernel: its name and its contract. Adding an op is one include and one line.
#pragma once

#include "ops/linear.h"
#include "ops/machine.h"
#include "ops/moe.h"

#define TML_CPU_OPS(X)               \
  X(pack_weight, PackWeightParams)   \
  X(linear, LinearParams)            \
  X(read_bytes, ReadBytesParams)     \
  X(dot_peak, DotPeakParams)         \
  X(moe, MoeParams)
