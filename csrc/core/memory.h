// Memory the kernels stream from: 2 MB pages where the system grants them.
#pragma once

#include <cstddef>

namespace tml {

// Zeroed, 2 MB-aligned, advised MADV_HUGEPAGE; committed by the system on first touch. Throws
// std::bad_alloc.
void* huge_alloc(std::size_t num_bytes);
void huge_free(void* data, std::size_t num_bytes) noexcept;

// Scratch of the calling thread, 64-byte aligned: grows to the largest request and is reused, so a
// steady state allocates nothing. Contents do not survive the next call with the same slot.
enum class Scratch : int { kOp = 0, kThread = 1, kStep = 2 };
void* scratch(Scratch slot, std::size_t num_bytes);

// Times any scratch slot grew since the process started (a steady state adds none).
std::size_t num_scratch_growths();

}  // namespace tml
