#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/memory.h"

namespace tml::cpu::TML_ISA_NS {

// Several arrays out of one scratch slot: take() each, then commit() sets the pointers. Arrays
// start on 64-byte boundaries.
class Arena {
 public:
  explicit Arena(Scratch slot) : slot_(slot) {}
  template <class T>
  Arena& take(T** pointer, std::int64_t count) {
    pointers_[num_arrays_] = pointer;
    offsets_[num_arrays_++] = size_;
    size_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return *this;
  }
  void commit() {
    auto* base = static_cast<char*>(scratch(slot_, size_));
    for (int i = 0; i < num_arrays_; ++i) {
      void* array = base + offsets_[i];
      std::memcpy(pointers_[i], &array, sizeof(array));
    }
  }

 private:
  static constexpr int kMaxArrays = 16;
  Scratch slot_;
  int num_arrays_ = 0;
  std::size_t size_ = 0;
  std::size_t offsets_[kMaxArrays];
  void* pointers_[kMaxArrays];  // addresses of the caller's pointers
};

}  // namespace tml::cpu::TML_ISA_NS
