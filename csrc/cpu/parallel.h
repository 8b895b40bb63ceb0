// Threads: OpenMP on the libgomp that torch brought. Work is split by output, never by reduction.
#pragma once

#include <omp.h>

#include <cstdint>

#include "cpu/vec.h"

namespace tml::cpu::TML_ISA_NS {

struct Range {
  std::int64_t begin, end;
};

// The part-th of num_parts contiguous pieces of [0, count), as even as possible.
TML_INLINE Range split(std::int64_t count, int part, int num_parts) {
  return {count * part / num_parts, count * (part + 1) / num_parts};
}

// body(thread, num_threads) on each thread of one region, denormals flushed. One thread skips it.
template <class Body>
void parallel(int num_threads, const Body& body) {
  if (num_threads <= 1) {
    FlushDenormals flush;
    body(0, 1);
    return;
  }
#pragma omp parallel num_threads(num_threads)
  {
    FlushDenormals flush;
    body(omp_get_thread_num(), omp_get_num_threads());
  }
}

}  // namespace tml::cpu::TML_ISA_NS
