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

// What lies between the rows is NaN: never read.
std::vector<std::uint16_t> wide_rows(std::int64_t rows, std::int64_t width, std::int64_t stride,
                                     std::uint64_t seed) {
  auto out = random_bf16(static_cast<std::size_t>(rows * stride), seed);
  for (std::int64_t r = 0; r < rows; ++r)
    std::fill(out.begin() + r * stride + width, out.begin() + (r + 1) * stride, kPoison);
  return out;
}
std::int64_t stride_of(std::int64_t width) { return width / 8 * 8 + 8; }

// A product's workspace as asked for, full of NaN.
template <class Run>
void with_workspace(std::size_t num_bytes, const Run& run) {
  std::vector<std::uint16_t> memory(num_bytes / 2 + 128, kPoison);
  const auto at = reinterpret_cast<std::uintptr_t>(memory.data());
  run(host_launch(reinterpret_cast<void*>((at + 255) / 256 * 256), num_bytes));
}

// A row of a result against chain(column), and nothing written past it.
template <class Chain>
void check_row(const std::vector<float>& y32, const std::vector<std::uint16_t>& y16, bool is_f32,
               std::int64_t row, std::int64_t width, std::int64_t stride, const Chain& chain) {
  for (std::int64_t n = 0; n < stride; ++n) {
    const auto at = static_cast<std::size_t>(row * stride + n);
    const float sum = n < width ? chain(n) : -7.0f;
    if (is_f32)
      TML_CHECK_EQUAL(y32[at], sum);
    else
      TML_CHECK_EQUAL(y16[at], to_bf16(sum));
  }
}

void check_dgrad(const Case& c, bool is_f32) {
  const std::int64_t dy_stride = stride_of(c.out_dim), w_stride = c.in_dim + 3;
  const std::int64_t dx_stride = c.in_dim + 5;
  const auto dy = wide_rows(c.tokens, c.out_dim, dy_stride, 1);
  const auto w = wide_rows(c.out_dim, c.in_dim, w_stride, 2);
  std::vector<float> dx32(static_cast<std::size_t>(c.tokens * dx_stride), -7.0f);
  std::vector<std::uint16_t> dx16(dx32.size(), to_bf16(-7.0f));
  void* dx = is_f32 ? static_cast<void*>(dx32.data()) : dx16.data();
  const LinearDgradParams p{dy.data(),
                            w.data(),
                            dx,
                            dy_stride,
                            w_stride,
                            dx_stride,
                            c.tokens,
                            c.in_dim,
                            c.out_dim,
                            DType::kBf16,
                            is_f32 ? DType::kF32 : DType::kBf16,
                            1};
  with_workspace(cuda::linear_dgrad_workspace_bytes(p),
                 [&](const cuda::Launch& launch) { cuda::linear_dgrad(p, launch); });
  std::vector<std::uint16_t> column(static_cast<std::size_t>(c.out_dim));
  for (std::int64_t t = 0; t < c.tokens; ++t)
    check_row(dx32, dx16, is_f32, t, c.in_dim, dx_stride, [&](std::int64_t k) {
      for (std::int64_t n = 0; n < c.out_dim; ++n)
        column[static_cast<std::size_t>(n)] = w[static_cast<std::size_t>(n * w_stride + k)];
      return mma_chain(dy.data() + t * dy_stride, column.data(), c.out_dim);
    });
}

// Chains of 512 tokens, added to 0 in ascending order.
void check_wgrad(const Case& c, bool is_f32) {
  const std::int64_t dy_stride = c.out_dim + 1, x_stride = stride_of(c.in_dim);
  const std::int64_t dw_stride = c.in_dim + 3;
  const auto dy = wide_rows(c.tokens, c.out_dim, dy_stride, 1);
  const auto x = wide_rows(c.tokens, c.in_dim, x_stride, 2);
  std::vector<float> dw32(static_cast<std::size_t>(c.out_dim * dw_stride), -7.0f);
  std::vector<std::uint16_t> dw16(dw32.size(), to_bf16(-7.0f));
  void* dw = is_f32 ? static_cast<void*>(dw32.data()) : dw16.data();
  const LinearWgradParams p{dy.data(),
                            x.data(),
                            dw,
                            dy_stride,
                            x_stride,
                            dw_stride,
                            c.tokens,
                            c.in_dim,
                            c.out_dim,
                            DType::kBf16,
                            is_f32 ? DType::kF32 : DType::kBf16,
                            1};
  with_workspace(cuda::linear_wgrad_workspace_bytes(p),
                 [&](const cuda::Launch& launch) { cuda::linear_wgrad(p, launch); });
  const auto column_of = [&](const std::vector<std::uint16_t>& rows, std::int64_t stride,
                             std::int64_t column) {
    std::vector<std::uint16_t> out;
    for (std::int64_t t = 0; t < c.tokens; ++t)
      out.push_back(rows[static_cast<std::size_t>(t * stride + column)]);
    return out;
  };
  std::vector<std::vector<std::uint16_t>> x_columns;
  for (std::int64_t k = 0; k < c.in_dim; ++k) x_columns.push_back(column_of(x, x_stride, k));
  for (std::int64_t n = 0; n < c.out_dim; ++n) {
    const auto a = column_of(dy, dy_stride, n);
    check_row(dw32, dw16, is_f32, n, c.in_dim, dw_stride, [&](std::int64_t k) {
      float total = 0.0f;
      for (std::int64_t t = 0; t < c.tokens; t += 512)
        total += mma_chain(x_columns[static_cast<std::size_t>(k)].data() + t, a.data() + t,
                           std::min<std::int64_t>(512, c.tokens - t));
      return total;
    });
  }
}

TML_TEST(cuda_linear_dgrad_is_the_contract_chain) {
  for (const Case& c : {Case{1, 64, 64}, Case{3, 75, 130}, Case{70, 72, 9}})
    for (const bool is_f32 : {false, true}) check_dgrad(c, is_f32);
}

TML_TEST(cuda_linear_wgrad_is_the_contract_chains) {
  for (const Case& c : {Case{1, 64, 64}, Case{75, 70, 130}, Case{0, 16, 8}})
    for (const bool is_f32 : {false, true}) check_wgrad(c, is_f32);
  check_wgrad({1100, 8, 16}, false);  // three chains; more stages than the ring holds
}

TML_TEST(cuda_linear_plain_is_linear) {
  const std::int64_t tokens = 5, in_dim = 75, out_dim = 130, stride = stride_of(in_dim);
  const auto x = wide_rows(tokens, in_dim, stride, 1), w = wide_rows(out_dim, in_dim, stride, 2);
  std::vector<float> y(static_cast<std::size_t>(tokens * out_dim));
  const LinearPlainParams p{x.data(), w.data(), y.data(), stride,       stride,      out_dim,
                            tokens,   in_dim,   out_dim,  DType::kBf16, DType::kF32, 1};
  with_workspace(cuda::linear_plain_workspace_bytes(p),
                 [&](const cuda::Launch& launch) { cuda::linear_plain(p, launch); });
  for (std::int64_t t = 0; t < tokens; ++t)
    for (std::int64_t n = 0; n < out_dim; ++n)
      TML_CHECK_EQUAL(y[static_cast<std::size_t>(t * out_dim + n)],
                      mma_chain(x.data() + t * stride, w.data() + n * stride, in_dim));
}

}  // namespace
}  // namespace tml::tests
