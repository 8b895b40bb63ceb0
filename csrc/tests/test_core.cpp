// What csrc/core promises: instruction-set choice, huge-page memory, scratch.
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "core/dtype.h"
#include "core/isa.h"
#include "core/memory.h"
#include "tests/check.h"

namespace tml::tests {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

TML_TEST(isa_scalar_always_runs) {
  TML_CHECK(isa_supported(Isa::kScalar));
  TML_CHECK(isa_supported(active_isa()));
}

TML_TEST(isa_is_set_by_name) {
  const Isa before = active_isa();
  for (int level = 0; level < kNumIsas; ++level) {
    const Isa isa = static_cast<Isa>(level);
    if (!isa_supported(isa)) continue;
    set_isa(isa_name(isa));
    TML_CHECK_EQUAL(static_cast<int>(active_isa()), level);
  }
  set_isa(isa_name(before));
}

TML_TEST(isa_refuses_an_unknown_name) {
  const Isa before = active_isa();
  bool refused = false;
  try {
    set_isa("mmx");
  } catch (const std::invalid_argument& error) {
    refused = std::strstr(error.what(), "got 'mmx'") != nullptr;
  }
  TML_CHECK(refused);
  TML_CHECK(active_isa() == before);
}

TML_TEST(huge_alloc_is_zeroed_and_aligned) {
  for (const std::size_t num_bytes : {std::size_t{0}, std::size_t{1}, kHugePage, kHugePage + 1}) {
    auto* data = static_cast<unsigned char*>(huge_alloc(num_bytes));
    TML_CHECK_EQUAL(reinterpret_cast<std::uintptr_t>(data) % kHugePage, 0u);
    for (std::size_t i = 0; i < num_bytes; i += 509) TML_CHECK_EQUAL(int{data[i]}, 0);
    if (num_bytes > 0) data[num_bytes - 1] = 1;
    huge_free(data, num_bytes);
  }
}

TML_TEST(scratch_grows_once) {
  void* first = scratch(Scratch::kOp, 3 << 20);
  const std::size_t growths = num_scratch_growths();
  TML_CHECK_EQUAL(reinterpret_cast<std::uintptr_t>(first) % 64, 0u);
  TML_CHECK(scratch(Scratch::kOp, 1000) == first);
  TML_CHECK(scratch(Scratch::kOp, 3 << 20) == first);
  TML_CHECK_EQUAL(num_scratch_growths(), growths);
  TML_CHECK(scratch(Scratch::kThread, 1000) != first);
}

TML_TEST(dtype_sizes_and_k_steps) {
  TML_CHECK_EQUAL(size_of(DType::kBf16), 2u);
  TML_CHECK_EQUAL(num_k_steps(DType::kBf16, 75), 38);
  TML_CHECK_EQUAL(num_k_steps(DType::kF32, 75), 75);
}

}  // namespace
}  // namespace tml::tests
