// linear of the device: index maths, ring and tiles, run on the host.
#include <algorithm>

#include "core/tensor_core.h"
#include "tests/cuda_kit.h"

namespace tml::tests {
namespace {

TML_TEST(cuda_weight_layout_is_a_bijection) {
  const std::int64_t n = 130, k = 100, k_blocks = cuda::blocks_of(k);
  std::vector<int> seen(static_cast<std::size_t>(cuda::packed_elements(n, k)), 0);
  for (std::int64_t row = 0; row < cuda::blocks_of(n) * 64; ++row)
    for (std::int64_t col = 0; col < k_blocks * 64; ++col)
      ++seen[static_cast<std::size_t>(cuda::weight_offset(row, col, k_blocks))];
  TML_CHECK(std::all_of(seen.begin(), seen.end(), [](int count) { return count == 1; }));
}

TML_TEST(cuda_descriptors_find_what_the_layouts_stored) {
  // A weight block at byte 4096, read through its descriptor at each k16 step.
  for (int step = 0; step < 4; ++step)
    for (int row = 0; row < 64; ++row)
      for (int k = 0; k < 16; ++k) {
        const auto weight = cuda::weight_descriptor(4096, step);
        TML_CHECK_EQUAL(cuda::descriptor_byte(weight, row, k),
                        4096 + 2 * cuda::weight_offset(row, step * 16 + k, 1));
        const int column = step * 16 + k;
        const auto token = cuda::token_descriptor(8192, step);
        TML_CHECK_EQUAL(
            cuda::descriptor_byte(token, row, k),
            8192u + static_cast<unsigned>(cuda::swizzled_bytes(row, column / 8)) + column % 8 * 2u);
      }
}

TML_TEST(cuda_fragments_cover_a_tile_once) {
  std::vector<int> seen(16 * 256, 0);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 128; ++i)
      ++seen[static_cast<std::size_t>(cuda::fragment_row(lane, i) * 256 +
                                      cuda::fragment_column(lane, i))];
  TML_CHECK(std::all_of(seen.begin(), seen.end(), [](int count) { return count == 1; }));
}

TML_TEST(cuda_swiglu_rows_pair_up) {
  for (std::int64_t row = 0; row < 128; ++row) {
    if (cuda::swiglu_is_up(row)) continue;
    TML_CHECK(cuda::swiglu_is_up(row + 8));
    TML_CHECK_EQUAL(cuda::swiglu_unit(row), cuda::swiglu_unit(row + 8));
  }
  TML_CHECK_EQUAL(cuda::swiglu_unit(127), 63);
}

struct Case {
  std::int64_t tokens, in_dim, out_dim;
};

// y against the contract chain of every output, computed one by one.
void check_linear(const Case& c, bool is_f32) {
  const std::int64_t x_stride = c.in_dim / 8 * 8 + 8, y_stride = c.out_dim + 3;
  auto x = random_bf16(static_cast<std::size_t>(c.tokens * x_stride), 1);
  const auto w = random_bf16(static_cast<std::size_t>(c.out_dim * c.in_dim), 2);
  for (std::int64_t t = 0; t < c.tokens; ++t)
    std::fill(x.begin() + t * x_stride + c.in_dim, x.begin() + (t + 1) * x_stride, kPoison);
  const auto packed = packed_weight(w, c.out_dim, c.in_dim);
  const std::size_t count = static_cast<std::size_t>(c.tokens * y_stride);
  std::vector<float> y32(count, -7.0f);
  std::vector<std::uint16_t> y16(count, to_bf16(-7.0f));
  void* y = is_f32 ? static_cast<void*>(y32.data()) : y16.data();
  cuda::linear({x.data(), packed.data(), y, x_stride, y_stride, c.tokens, c.in_dim, c.out_dim,
                DType::kBf16, is_f32 ? DType::kF32 : DType::kBf16, 1},
               host_launch());
  for (std::int64_t t = 0; t < c.tokens; ++t)
    for (std::int64_t n = 0; n < y_stride; ++n) {
      const auto at = static_cast<std::size_t>(t * y_stride + n);
      const float sum = n < c.out_dim
                            ? mma_chain(x.data() + t * x_stride, w.data() + n * c.in_dim, c.in_dim)
                            : -7.0f;
      if (is_f32)
        TML_CHECK_EQUAL(y32[at], sum);
      else
        TML_CHECK_EQUAL(y16[at], to_bf16(sum));
    }
}

TML_TEST(cuda_linear_is_the_contract_chain) {
  for (const Case& c : {Case{1, 64, 64}, Case{3, 75, 130}, Case{16, 1000, 65}, Case{17, 96, 200},
                        Case{70, 136, 72}})
    for (const bool is_f32 : {false, true}) check_linear(c, is_f32);
}

TML_TEST(cuda_linear_of_many_tokens_is_the_contract_chain) {
  check_linear({130, 600, 70}, false);  // more stages than the ring holds
  check_linear({300, 64, 136}, true);
}

TML_TEST(cuda_linear_of_nothing) { check_linear({0, 64, 64}, false); }

}  // namespace
}  // namespace tml::tests
