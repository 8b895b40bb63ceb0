// linear and pack_weight called as C++ functions: value against float64, bits on every level.
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/contract.h"
#include "core/isa.h"
#include "cpu/cpu.h"
#include "tests/check.h"

namespace tml::tests {
namespace {

// A small multiplicative generator: the same numbers on every machine.
class Draw {
 public:
  float operator()() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<std::int32_t>(state_ >> 32)) * 0x1p-31f;
  }

 private:
  std::uint64_t state_ = 7;
};

float bf16_value(std::uint16_t bits) {
  const std::uint32_t wide = std::uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
std::uint16_t bf16_truncated(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<std::uint16_t>(bits >> 16);
}
float value_of(float x) { return x; }
float value_of(std::uint16_t x) { return bf16_value(x); }
void assign(float& x, float value) { x = value; }
void assign(std::uint16_t& x, float value) { x = bf16_truncated(value); }

template <class T>
constexpr DType kDType = sizeof(T) == 2 ? DType::kBf16 : DType::kF32;

template <class T>
struct Case {
  std::int64_t num_tokens, out_dim, in_dim;
  std::vector<T> x, w;
  std::vector<std::uint32_t> packed;

  Case(std::int64_t t, std::int64_t n, std::int64_t k) : num_tokens(t), out_dim(n), in_dim(k) {
    Draw draw;
    x.resize(static_cast<std::size_t>(t * k));
    w.resize(static_cast<std::size_t>(n * k));
    for (T& value : x) assign(value, draw());
    for (T& value : w) assign(value, draw());
    const std::int64_t panels = ceil_div(n, contract::kPanel);
    packed.assign(static_cast<std::size_t>(panels * num_k_steps(kDType<T>, k) * contract::kPanel),
                  ~0u);
    cpu::pack_weight({w.data(), packed.data(), k, n, k, kDType<T>, 1});
  }

  std::vector<float> run(int num_threads) const {
    std::vector<float> y(static_cast<std::size_t>(num_tokens * out_dim), NAN);
    cpu::linear({x.data(), packed.data(), y.data(), in_dim, out_dim, num_tokens, in_dim, out_dim,
                 kDType<T>, DType::kF32, num_threads});
    return y;
  }

  double expected(std::int64_t token, std::int64_t out) const {
    double sum = 0.0;
    for (std::int64_t k = 0; k < in_dim; ++k)
      sum += double{value_of(x[static_cast<std::size_t>(token * in_dim + k)])} *
             double{value_of(w[static_cast<std::size_t>(out * in_dim + k)])};
    return sum;
  }
};

template <class T>
void check_linear() {
  const Isa before = active_isa();
  for (const auto& [t, n, k] : {std::array<int, 3>{1, 1, 1}, {19, 100, 75}, {33, 70, 257}}) {
    const Case<T> test(t, n, k);
    const std::vector<float> y = test.run(1);
    for (int token = 0; token < t; ++token)
      for (int out = 0; out < n; ++out) {
        // One rounding a step of a sum of k products of numbers below one.
        const double error =
            y[static_cast<std::size_t>(token * n + out)] - test.expected(token, out);
        TML_CHECK(std::fabs(error) < 1e-7 * k * k);
      }
    for (int level = 0; level < kNumIsas; ++level) {
      if (!isa_supported(static_cast<Isa>(level))) continue;
      set_isa(isa_name(static_cast<Isa>(level)));
      for (const int threads : {1, 2}) {
        const std::vector<float> other = test.run(threads);
        TML_CHECK(std::memcmp(other.data(), y.data(), y.size() * sizeof(float)) == 0);
      }
    }
    set_isa(isa_name(before));
  }
}

TML_TEST(linear_f32_value_and_bits) { check_linear<float>(); }
TML_TEST(linear_bf16_value_and_bits) { check_linear<std::uint16_t>(); }

TML_TEST(linear_of_no_tokens_writes_nothing) {
  const Case<float> test(0, 40, 8);
  TML_CHECK(test.run(1).empty());
}

// A decode-sized product for a profiler: `perf record tml_cpp_tests linear_streams 2000`.
TML_TEST(linear_streams_a_weight) {
  static const Case<std::uint16_t> test(1, 2048, 1024);
  const std::vector<float> y = test.run(2);
  TML_CHECK(std::fabs(y[5] - test.expected(0, 5)) < 1e-3);
}

}  // namespace
}  // namespace tml::tests
