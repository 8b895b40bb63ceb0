// Work on several threads: split by output, never by reduction.
#pragma once

#include <cstdint>

#include "core/team.h"
#include "cpu/vec.h"

namespace tml::cpu::TML_ISA_NS {

struct Range {
  std::int64_t begin, end;
};

// The part-th of num_parts contiguous pieces of [0, count), as even as possible.
TML_INLINE Range split(std::int64_t count, int part, int num_parts) {
  return {count * part / num_parts, count * (part + 1) / num_parts};
}

// body(thread, num_threads) on each thread of one region, denormals flushed; inside it team_barrier
// lines the threads up. One thread skips it.
template <class Body>
void parallel(int num_threads, const Body& body) {
  const auto run = [](const void* context, int thread, int size) {
    FlushDenormals flush;
    (*static_cast<const Body*>(context))(thread, size);
  };
  team_parallel(num_threads, run, &body);
}

}  // namespace tml::cpu::TML_ISA_NS
