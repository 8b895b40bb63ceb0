// read_bytes, dot_peak: what this machine can do at most, so that a measurement can be printed as a
// share of the limit seen in the same run. Neither is part of the model.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tml {

// sum = the 64-bit words of `data`, added modulo 2^64 (the order is free: integers).
struct ReadBytesParams {
  const std::uint64_t* data;  // [num_words], 64-byte aligned
  std::uint64_t* sum;
  std::int64_t num_words;
  int num_threads;
};

// num_steps dot-product steps of a full register tile on each thread, with operands that stay in
// registers: the instruction rate alone.
struct DotPeakParams {
  float* sum;     // keeps the work alive
  double* flops;  // floating-point operations done, all threads
  std::int64_t num_steps;
  DType dtype;  // kBf16 or kF32
  int num_threads;
};

}  // namespace tml
