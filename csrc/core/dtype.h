// Element types that cross the boundary, and nothing else about them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tml {

enum class DType : std::uint8_t { kF32, kBf16, kI32, kI64, kU8 };

// Internal linkage: kernel files are compiled per instruction set and must not share bodies.
static constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBf16:
      return 2;
    case DType::kI64:
      return 8;
    case DType::kU8:
      return 1;
  }
  return 0;
}

static constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "float32";
    case DType::kBf16:
      return "bfloat16";
    case DType::kI32:
      return "int32";
    case DType::kI64:
      return "int64";
    case DType::kU8:
      return "uint8";
  }
  return "unknown";
}

// Packed operands are arrays of 32-bit k-steps: two bf16 of consecutive k, or one fp32.
static constexpr std::int64_t num_k_steps(DType dtype, std::int64_t k) {
  return dtype == DType::kBf16 ? (k + 1) / 2 : k;
}

static constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace tml
