// The tensor-core model: cases worked by hand, and the properties the contract rests on.
#include <algorithm>
#include <cmath>

#include "core/tensor_core.h"
#include "tests/cuda_kit.h"

namespace tml::tests {
namespace {

std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// One step with only the first terms set.
float step(std::initializer_list<float> a, std::initializer_list<float> b, float c,
           const MmaModel& model = {}) {
  std::uint16_t x[kMmaDepth] = {}, y[kMmaDepth] = {};
  std::size_t i = 0;
  for (const float v : a) x[i++] = to_bf16(v);
  i = 0;
  for (const float v : b) y[i++] = to_bf16(v);
  return mma_step(x, y, c, model);
}

TML_TEST(tensor_core_adds_exactly_within_its_window) {
  TML_CHECK_EQUAL(step({1.5f, -2.0f}, {3.0f, 0.25f}, 10.0f), 14.0f);
  TML_CHECK_EQUAL(step({1.0f, -1.0f}, {1.0f, 1.0f}, 0x1p-20f), 0x1p-20f);
  // 2^24 + 1 fits the 25 bits of the sum but not fp32: cut towards zero, from either side.
  TML_CHECK_EQUAL(step({1.0f}, {1.0f}, 16777216.0f), 16777216.0f);
  TML_CHECK_EQUAL(step({-1.0f}, {1.0f}, 16777216.0f), 16777215.0f);
  TML_CHECK_EQUAL(step({3.0f}, {1.0f}, 16777216.0f), 16777218.0f);  // nearest even: 16777220
  TML_CHECK_EQUAL(step({-3.0f}, {1.0f}, -16777216.0f), -16777218.0f);
}

TML_TEST(tensor_core_cuts_each_term_at_its_window) {
  // Sixteen terms of 2^-26 beside 1: each is cut away, though together they would count.
  std::uint16_t a[kMmaDepth], b[kMmaDepth];
  for (int i = 0; i < kMmaDepth; ++i) {
    a[i] = to_bf16(0x1p-13f);
    b[i] = to_bf16(0x1p-13f);
  }
  TML_CHECK_EQUAL(mma_step(a, b, 1.0f), 1.0f);
  MmaModel wide;
  wide.fraction_bits = 26;
  TML_CHECK_EQUAL(mma_step(a, b, 1.0f, wide), 1.0f + 0x1p-22f);
  // 2^-25 is the last place that counts: sixteen of them are 2^-21.
  for (std::uint16_t& x : a) x = to_bf16(0x1p-12f);
  TML_CHECK_EQUAL(mma_step(a, b, 1.0f), 1.0f + 0x1p-21f);
}

TML_TEST(tensor_core_products_keep_their_carry) {
  // 1.5 * 1.5 = 2.25 has exponent 0 in the alignment: 2^-25 still counts beside it.
  TML_CHECK_EQUAL(step({1.5f, -1.5f, 0x1p-12f}, {1.5f, 1.5f, 0x1p-13f}, 0.0f), 0x1p-25f);
  TML_CHECK_EQUAL(step({2.25f, -2.25f, 0x1p-12f}, {1.0f, 1.0f, 0x1p-13f}, 0.0f), 0.0f);
}

TML_TEST(tensor_core_short_way_is_the_model) {
  Random random(3);
  for (int round = 0; round < 20000; ++round) {
    std::uint16_t a[kMmaDepth], b[kMmaDepth];
    // Any bits; then numbers of like size; then many zeros; denormals and specials among them all.
    const auto draw = [&]() -> std::uint16_t {
      const std::uint32_t bits = random.bits();
      if (round % 3 == 0) return static_cast<std::uint16_t>(bits);
      if (round % 3 == 1) return to_bf16(random.normal());
      return bits % 4 != 0 ? std::uint16_t{0} : static_cast<std::uint16_t>(bits >> 8 & 0x80ff);
    };
    for (int i = 0; i < kMmaDepth; ++i) {
      a[i] = draw();
      b[i] = draw();
    }
    const std::uint32_t c = round % 5 == 0   ? 0x80000000u
                            : round % 2 == 0 ? bits_of(random.normal())
                                             : random.bits() * 0x10001u;
    TML_CHECK_EQUAL(mma_step(a, b, c), mma_step(a, b, c, MmaModel{}));
  }
}

TML_TEST(tensor_core_special_values) {
  const float inf = __builtin_inff(), nan = __builtin_nanf("");
  TML_CHECK_EQUAL(step({inf}, {2.0f}, 1.0f), inf);
  TML_CHECK_EQUAL(step({inf}, {-2.0f}, 1.0f), -inf);
  TML_CHECK_EQUAL(bits_of(step({inf}, {0.0f}, 1.0f)), kMmaNan);
  TML_CHECK_EQUAL(bits_of(step({inf, 1.0f}, {1.0f, -inf}, 0.0f)), kMmaNan);
  TML_CHECK_EQUAL(bits_of(step({nan}, {0.0f}, 0.0f)), kMmaNan);
  TML_CHECK_EQUAL(bits_of(step({}, {}, nan)), kMmaNan);
  TML_CHECK_EQUAL(bits_of(step({}, {}, 0.0f)), 0u);
  TML_CHECK_EQUAL(bits_of(step({-0.0f}, {1.0f}, 0.0f)), 0u);
  TML_CHECK_EQUAL(step({0x1p127f, 0x1p127f}, {1.0f, 1.0f}, 0.0f), inf);
  MmaModel saturating;
  saturating.overflows_to_infinity = false;
  TML_CHECK_EQUAL(step({0x1p127f, 0x1p127f}, {1.0f, 1.0f}, 0.0f, saturating), 3.40282347e+38f);
}

TML_TEST(tensor_core_denormals) {
  // A denormal bf16, a product below fp32's normals, and an accumulator there.
  TML_CHECK_EQUAL(step({0x1p-130f}, {0x1p10f}, 0.0f), 0x1p-120f);
  TML_CHECK_EQUAL(step({0x1p-70f}, {0x1p-70f}, 0.0f), 0x1p-140f);
  TML_CHECK_EQUAL(step({}, {}, 0x1p-149f), 0x1p-149f);
  MmaModel flushing;
  flushing.flushes_inputs = flushing.flushes_output = true;
  TML_CHECK_EQUAL(step({0x1p-130f}, {0x1p10f}, 0.0f, flushing), 0.0f);
  TML_CHECK_EQUAL(step({0x1p-70f}, {0x1p-70f}, 0.0f, flushing), 0.0f);
}

TML_TEST(tensor_core_zero_products_do_not_align_unless_told) {
  TML_CHECK_EQUAL(step({0.0f}, {0x1p100f}, 1.0f), 1.0f);
  MmaModel aligning;
  aligning.zero_products_align = true;
  TML_CHECK_EQUAL(step({0.0f}, {0x1p126f}, 0x1p-60f, aligning), 0.0f);
}

TML_TEST(tensor_core_order_inside_a_group_is_free) {
  Random random(1);
  for (int round = 0; round < 2000; ++round) {
    std::uint16_t a[kMmaDepth], b[kMmaDepth];
    for (int i = 0; i < kMmaDepth; ++i) {
      a[i] = to_bf16(std::ldexp(random.normal(), static_cast<int>(random.below(40)) - 20));
      b[i] = to_bf16(random.normal());
    }
    const float c = random.normal();
    const float first = mma_step(a, b, c);
    TML_CHECK_EQUAL(bits_of(mma_step(b, a, c)), bits_of(first));
    for (int i = kMmaDepth - 1; i > 0; --i) {
      const auto j = static_cast<int>(random.below(i + 1));
      std::swap(a[i], a[j]);
      std::swap(b[i], b[j]);
    }
    TML_CHECK_EQUAL(bits_of(mma_step(a, b, c)), bits_of(first));
  }
}

TML_TEST(tensor_core_is_near_the_exact_sum) {
  // The window of 25 bits below the largest term bounds the error: 17 cuts and one of fp32.
  const std::int64_t depth = 512;
  const auto a = random_bf16(depth, 2), b = random_bf16(depth, 3);
  double exact = 0.0, magnitude = 0.0;
  for (std::int64_t k = 0; k < depth; ++k) {
    exact += static_cast<double>(to_float(a[k])) * to_float(b[k]);
    magnitude += std::fabs(static_cast<double>(to_float(a[k])) * to_float(b[k]));
  }
  TML_CHECK_NEAR(mma_chain(a.data(), b.data(), depth), exact, magnitude * 32 * 0x1p-23);
}

TML_TEST(tensor_core_zero_padding_is_neutral) {
  auto a = random_bf16(96, 4), b = random_bf16(96, 5);
  const float sum = mma_chain(a.data(), b.data(), 75);
  for (std::size_t k = 75; k < 96; ++k) a[k] = b[k] = 0;
  TML_CHECK_EQUAL(bits_of(mma_chain(a.data(), b.data(), 96)), bits_of(sum));
}

}  // namespace
}  // namespace tml::tests
