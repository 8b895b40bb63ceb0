// What the tests of the device kernels share: the kernels run on the host (cuda/host/simt.h), with
// the arithmetic of core/tensor_core.h in place of the tensor cores.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/cuda.h"
#include "cuda/layout.h"
#include "cuda/math.h"
#include "tests/check.h"

namespace tml::tests {

// Three multiprocessors: enough that blocks take turns, few enough that each has several tiles.
inline cuda::Launch host_launch(void* workspace = nullptr, std::size_t num_bytes = 0) {
  return {nullptr, workspace, num_bytes, 3};
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  std::uint32_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<std::uint32_t>(state_ >> 16);
  }
  std::int64_t below(std::int64_t n) { return static_cast<std::int64_t>(bits()) % n; }
  // Roughly normal, mean 0, deviation 1.
  float normal() {
    float sum = 0.0f;
    for (int i = 0; i < 12; ++i) sum += static_cast<float>(bits()) * 0x1p-32f;
    return sum - 6.0f;
  }

 private:
  std::uint64_t state_;
};

inline float to_float(std::uint16_t x) { return cuda::low_bf16(x); }
inline std::uint16_t to_bf16(float x) {
  return static_cast<std::uint16_t>(cuda::pack_bf16(x, 0.0f));
}
inline std::vector<std::uint16_t> random_bf16(std::size_t count, std::uint64_t seed,
                                              float scale = 1.0f) {
  Random random(seed);
  std::vector<std::uint16_t> out(count);
  for (std::uint16_t& x : out) x = to_bf16(random.normal() * scale);
  return out;
}
inline std::vector<float> random_f32(std::size_t count, std::uint64_t seed, float scale = 1.0f) {
  Random random(seed);
  std::vector<float> out(count);
  for (float& x : out) x = random.normal() * scale;
  return out;
}

inline constexpr std::uint16_t kPoison = 0x7fc1;  // a NaN

// A [n, k] weight (rows k apart) as the device holds it.
inline std::vector<std::uint16_t> packed_weight(const std::vector<std::uint16_t>& w, std::int64_t n,
                                                std::int64_t k) {
  std::vector<std::uint16_t> packed(static_cast<std::size_t>(cuda::packed_elements(n, k)), kPoison);
  cuda::pack_weight({w.data(), packed.data(), k, n, k, DType::kBf16, 1}, host_launch());
  return packed;
}

#define TML_CHECK_NEAR(a, b, tolerance)                                                            \
  ::tml::tests::check_near(static_cast<double>(a), static_cast<double>(b), tolerance, #a " ~ " #b, \
                           __FILE__, __LINE__)
inline void check_near(double a, double b, double tolerance, const char* text, const char* file,
                       int line) {
  if (std::fabs(a - b) <= tolerance) return;
  std::ostringstream message;
  message << file << ":" << line << ": " << text << " (" << a << " against " << b << ")";
  throw std::runtime_error(message.str());
}

}  // namespace tml::tests
