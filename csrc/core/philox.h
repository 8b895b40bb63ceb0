// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): 128 random
// bits as a pure function of a 128-bit counter and a 64-bit key. Always inlined, so that each
// instruction-set build of a kernel keeps its own copy.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TML_PHILOX __host__ __device__ __forceinline__ constexpr
#else
#define TML_PHILOX __attribute__((always_inline)) inline constexpr
#endif

namespace tml {

struct PhiloxCounter {
  std::uint32_t word[4];
};
struct PhiloxKey {
  std::uint32_t word[2];
};

inline constexpr int kPhiloxRounds = 10;

// Which draw a counter belongs to (its last word), so that no two uses share random numbers.
enum class PhiloxStream : std::uint32_t { kVocabulary = 0 };

TML_PHILOX PhiloxCounter philox_round(PhiloxCounter c, PhiloxKey key) {
  const std::uint64_t a = std::uint64_t{0xD2511F53u} * c.word[0];
  const std::uint64_t b = std::uint64_t{0xCD9E8D57u} * c.word[2];
  return {{static_cast<std::uint32_t>(b >> 32) ^ c.word[1] ^ key.word[0],
           static_cast<std::uint32_t>(b),
           static_cast<std::uint32_t>(a >> 32) ^ c.word[3] ^ key.word[1],
           static_cast<std::uint32_t>(a)}};
}

TML_PHILOX PhiloxKey philox_next_key(PhiloxKey key) {
  return {{key.word[0] + 0x9E3779B9u, key.word[1] + 0xBB67AE85u}};
}

TML_PHILOX PhiloxCounter philox4x32(PhiloxCounter counter, PhiloxKey key) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    counter = philox_round(counter, key);
    key = philox_next_key(key);
  }
  return counter;
}

// The key and counter of draw `index` of (seed, position): word index % 4 of this block is its
// bits.
TML_PHILOX PhiloxKey philox_key(std::int64_t seed) {
  const auto bits = static_cast<std::uint64_t>(seed);
  return {{static_cast<std::uint32_t>(bits), static_cast<std::uint32_t>(bits >> 32)}};
}
TML_PHILOX PhiloxCounter philox_counter(PhiloxStream stream, std::int64_t position,
                                        std::uint32_t index) {
  const auto bits = static_cast<std::uint64_t>(position);
  return {{index / 4, static_cast<std::uint32_t>(bits), static_cast<std::uint32_t>(bits >> 32),
           static_cast<std::uint32_t>(stream)}};
}

}  // namespace tml
