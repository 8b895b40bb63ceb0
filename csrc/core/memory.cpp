#include "core/memory.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(data, size) (static_cast<void>(data), static_cast<void>(size))
#define ASAN_UNPOISON_MEMORY_REGION(data, size) (static_cast<void>(data), static_cast<void>(size))
#endif

namespace tml {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
std::atomic<std::size_t> g_growths{0};

std::size_t mapped_size(std::size_t num_bytes) {
  const std::size_t size = num_bytes == 0 ? 1 : num_bytes;
  return (size + kHugePage - 1) / kHugePage * kHugePage;
}

struct Slab {
  void* data = nullptr;
  std::size_t size = 0;
  ~Slab() {
    if (data != nullptr) huge_free(data, size);
  }
};

thread_local Slab t_slabs[3];

// AddressSanitizer knows nothing of mapped memory: what lies beyond what was asked for is ours to
// forbid.
void forbid_beyond(void* data, std::size_t num_bytes, std::size_t size) {
  ASAN_UNPOISON_MEMORY_REGION(data, num_bytes);
  ASAN_POISON_MEMORY_REGION(static_cast<char*>(data) + num_bytes, size - num_bytes);
}

}  // namespace

void* huge_alloc(std::size_t num_bytes) {
  const std::size_t size = mapped_size(num_bytes);
  // Map one page more than asked so that an aligned start exists, then give back both ends.
  void* raw = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  const auto begin = reinterpret_cast<std::uintptr_t>(raw);
  const std::uintptr_t start = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (start > begin) munmap(raw, start - begin);
  const std::uintptr_t tail = begin + size + kHugePage - (start + size);
  if (tail > 0) munmap(reinterpret_cast<void*>(start + size), tail);
  void* data = reinterpret_cast<void*>(start);
  madvise(data, size, MADV_HUGEPAGE);
  forbid_beyond(data, num_bytes, size);
  return data;
}

void huge_free(void* data, std::size_t num_bytes) noexcept {
  const std::size_t size = mapped_size(num_bytes);
  ASAN_UNPOISON_MEMORY_REGION(data, size);
  munmap(data, size);
}

void* scratch(Scratch slot, std::size_t num_bytes) {
  Slab& slab = t_slabs[static_cast<int>(slot)];
  if (slab.size < num_bytes) {
    const std::size_t size = mapped_size(num_bytes + num_bytes / 2);
    void* data = huge_alloc(size);
    if (slab.data != nullptr) huge_free(slab.data, slab.size);
    slab.data = data;
    slab.size = size;
    g_growths.fetch_add(1, std::memory_order_relaxed);
  }
  forbid_beyond(slab.data, num_bytes, slab.size);
  return slab.data;
}

std::size_t num_scratch_growths() { return g_growths.load(std::memory_order_relaxed); }

}  // namespace tml
