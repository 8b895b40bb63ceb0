// Gumbel noise of vocabulary ids (contract: ops/lm_head.h). Plain loops over lanes: integer work
// and per-lane float operations have the same bits however the compiler vectorises them.
#pragma once

#include "core/contract.h"
#include "core/philox.h"
#include "cpu/vec.h"

namespace tml::cpu::TML_ISA_NS {

// -log(-log u), u = (bits + 1/2) / 2^32. In the upper half the logarithm is taken through 1 - u, so
// that the largest draws, which decide among unlikely ids, keep full relative precision.
TML_INLINE float gumbel_of(std::uint32_t bits) {
  const bool upper = bits >= 0x80000000u;
  const auto from_end = static_cast<std::int32_t>(upper ? ~bits : bits);
  const float near = (static_cast<float>(from_end) + 0.5f) * 0x1p-32f;
  const float u = upper ? 1.0f - near : near;
  const float log_u = log1(u);
  // log(1 - near) = log(u) * near / (1 - u) corrects the rounding of u; u = 1 leaves -near.
  const float corrected = u == 1.0f ? -near : log_u * (near / (1.0f - u));
  return -log1(-(upper ? corrected : log_u));
}

TML_INLINE float gumbel_at(PhiloxKey key, std::int64_t position, std::int64_t id) {
  const auto index = static_cast<std::uint32_t>(id);
  const PhiloxCounter words =
      philox4x32(philox_counter(PhiloxStream::kVocabulary, position, index), key);
  return gumbel_of(words.word[index % 4]);
}

// g[i] = gumbel_at(key, position, 128 * block + i).
inline void gumbel_block(PhiloxKey key, std::int64_t position, std::int64_t block, float* g) {
  constexpr int kCounters = contract::kVocabBlock / 4;
  alignas(64) std::uint32_t word[4][kCounters];
  for (int i = 0; i < kCounters; ++i) {
    const auto index = static_cast<std::uint32_t>(block * contract::kVocabBlock + 4 * i);
    const PhiloxCounter c = philox_counter(PhiloxStream::kVocabulary, position, index);
    for (int w = 0; w < 4; ++w) word[w][i] = c.word[w];
  }
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int i = 0; i < kCounters; ++i) {
      const PhiloxCounter c = philox_round({{word[0][i], word[1][i], word[2][i], word[3][i]}}, key);
      word[0][i] = c.word[0];
      word[1][i] = c.word[1];
      word[2][i] = c.word[2];
      word[3][i] = c.word[3];
    }
    key = philox_next_key(key);
  }
  alignas(64) std::uint32_t bits[contract::kVocabBlock];
  for (int i = 0; i < kCounters; ++i)
    for (int w = 0; w < 4; ++w) bits[4 * i + w] = word[w][i];
  for (int i = 0; i < contract::kVocabBlock; ++i) g[i] = gumbel_of(bits[i]);
}

}  // namespace tml::cpu::TML_ISA_NS
