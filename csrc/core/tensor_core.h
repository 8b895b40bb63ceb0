// What a Hopper tensor core does with sixteen bf16 products and an fp32 accumulator, in integers,
// bit for bit as far as the model below is right: the products are exact, all seventeen terms are
// cut towards zero at `fraction_bits` below the largest exponent, added exactly, and the sum is cut
// towards zero to fp32. (MMA-Sim, arXiv 2511.10909, gives this model for mma.sync m16n8k16 and
// wgmma k16; bench/gpu_numerics asks a device.) Host code: the oracle of machines without a GPU.
#pragma once

#include <cstdint>
#include <cstring>

namespace tml {

// The facts that a device must confirm.
struct MmaModel {
  int fraction_bits = 25;
  bool flushes_inputs = false;        // denormal operands count as zero
  bool flushes_output = false;        // denormal sums become zero
  bool zero_products_align = false;   // a zero product still takes part in the largest exponent
  bool overflows_to_infinity = true;  // else to the largest number, as rounding towards zero would
};

inline constexpr int kMmaDepth = 16;
inline constexpr std::uint32_t kMmaNan = 0x7fffffffu;

namespace mma_detail {

// A finite number: (-1)^negative * significand * 2^(exponent - fraction), exponent unnormalised.
struct Term {
  bool negative;
  std::uint64_t significand;
  int exponent;
  int fraction;
};
enum class Kind { kFinite, kInfinite, kNan };

inline Kind split(std::uint32_t bits, int fraction, bool flush, Term* out) {
  const int biased = static_cast<int>(bits >> fraction & 0xffu);
  const std::uint32_t mantissa = bits & ((1u << fraction) - 1u);
  out->negative = (bits >> (fraction + 8) & 1u) != 0;
  out->fraction = fraction;
  if (biased == 255) return mantissa != 0 ? Kind::kNan : Kind::kInfinite;
  out->exponent = biased == 0 ? -126 : biased - 127;
  out->significand = biased == 0 ? (flush ? 0u : mantissa) : mantissa | 1u << fraction;
  return Kind::kFinite;
}

// sum * 2^(exponent - fraction_bits) as fp32, cut towards zero.
inline std::uint32_t cut(std::int64_t sum, int exponent, const MmaModel& model) {
  if (sum == 0) return 0;
  const std::uint32_t sign = sum < 0 ? 0x80000000u : 0u;
  const auto magnitude = static_cast<std::uint64_t>(sum < 0 ? -sum : sum);
  const int top = 63 - __builtin_clzll(magnitude);
  int value_exponent = exponent - model.fraction_bits + top;  // of the leading bit
  if (value_exponent > 127) return sign | (model.overflows_to_infinity ? 0x7f800000u : 0x7f7fffffu);
  const bool denormal = value_exponent < -126;
  if (denormal && model.flushes_output) return sign;
  if (denormal) value_exponent = -126;
  // Bits below 2^(value_exponent - 23) are dropped.
  const int drop = value_exponent - 23 - (exponent - model.fraction_bits);
  const std::uint64_t kept = drop >= 64 ? 0 : drop >= 0 ? magnitude >> drop : magnitude << -drop;
  if (denormal) return sign | static_cast<std::uint32_t>(kept);
  return sign | static_cast<std::uint32_t>(value_exponent + 127) << 23 |
         (static_cast<std::uint32_t>(kept) & 0x7fffffu);
}

// The same for the default model where every operand is finite; false: it is not so. What most
// steps are: the tests that run whole models stand on its speed.
inline bool finite_step(const std::uint16_t* a, const std::uint16_t* b, std::uint32_t c,
                        std::uint32_t* out) {
  constexpr int kNone = -1000;
  std::int32_t significands[kMmaDepth], exponents[kMmaDepth];
  int exponent = kNone;
  unsigned special = 0;
  for (int i = 0; i < kMmaDepth; ++i) {
    const int ea = a[i] >> 7 & 0xff, eb = b[i] >> 7 & 0xff;
    special |= static_cast<unsigned>(ea == 255) | static_cast<unsigned>(eb == 255);
    const std::int32_t product =
        ((ea != 0 ? 0x80 : 0) | (a[i] & 0x7f)) * ((eb != 0 ? 0x80 : 0) | (b[i] & 0x7f));
    significands[i] = ((a[i] ^ b[i]) & 0x8000) != 0 ? -product : product;
    exponents[i] = product == 0 ? kNone : (ea != 0 ? ea : 1) + (eb != 0 ? eb : 1) - 254;
    exponent = exponents[i] > exponent ? exponents[i] : exponent;
  }
  const int ec = static_cast<int>(c >> 23 & 0xffu);
  if (special != 0 || ec == 255) return false;
  if (exponent == kNone) return *out = (c << 1) == 0 ? 0 : c, true;
  const auto last = static_cast<std::int64_t>((ec != 0 ? 0x800000u : 0u) | (c & 0x7fffffu));
  const int last_exponent = last == 0 ? kNone : (ec != 0 ? ec : 1) - 127;
  exponent = last_exponent > exponent ? last_exponent : exponent;
  const MmaModel model;
  // Cut towards zero: magnitudes are shifted, not two's complements.
  const auto cut_at = [&](std::int64_t magnitude, int fraction, int e) -> std::int64_t {
    const int shift = model.fraction_bits - fraction - (exponent - e);
    return shift >= 0 ? magnitude << shift : shift <= -63 ? 0 : magnitude >> -shift;
  };
  std::int64_t sum = cut_at(last, 23, last_exponent);
  sum = (c >> 31) != 0 ? -sum : sum;
  for (int i = 0; i < kMmaDepth; ++i) {
    const std::int64_t term =
        cut_at(significands[i] < 0 ? -significands[i] : significands[i], 14, exponents[i]);
    sum += significands[i] < 0 ? -term : term;
  }
  return *out = cut(sum, exponent, model), true;
}

}  // namespace mma_detail

// The bits of c + sum of a[i] * b[i], i < 16: one step of one accumulator.
inline std::uint32_t mma_step(const std::uint16_t* a, const std::uint16_t* b, std::uint32_t c,
                              const MmaModel& model) {
  using mma_detail::Kind;
  using mma_detail::Term;
  Term terms[kMmaDepth + 1];
  bool aligns[kMmaDepth + 1];
  bool is_nan = false, plus_infinity = false, minus_infinity = false;
  const auto infinite = [&](bool negative) { (negative ? minus_infinity : plus_infinity) = true; };
  for (int i = 0; i < kMmaDepth; ++i) {
    Term x{}, y{};
    const Kind kx = mma_detail::split(a[i], 7, model.flushes_inputs, &x);
    const Kind ky = mma_detail::split(b[i], 7, model.flushes_inputs, &y);
    terms[i] = {x.negative != y.negative, 0, 0, 14};
    aligns[i] = false;
    if (kx == Kind::kNan || ky == Kind::kNan) {
      is_nan = true;
    } else if (kx == Kind::kInfinite || ky == Kind::kInfinite) {
      const bool by_zero = (kx == Kind::kFinite && x.significand == 0) ||
                           (ky == Kind::kFinite && y.significand == 0);
      if (by_zero)
        is_nan = true;
      else
        infinite(terms[i].negative);
    } else {
      terms[i].significand = x.significand * y.significand;
      terms[i].exponent = x.exponent + y.exponent;
      aligns[i] = terms[i].significand != 0 || model.zero_products_align;
    }
  }
  Term& last = terms[kMmaDepth];
  const Kind kc = mma_detail::split(c, 23, false, &last);
  aligns[kMmaDepth] = kc == Kind::kFinite && last.significand != 0;
  if (kc == Kind::kNan) is_nan = true;
  if (kc == Kind::kInfinite) infinite(last.negative);
  if (is_nan || (plus_infinity && minus_infinity)) return kMmaNan;
  if (plus_infinity || minus_infinity) return minus_infinity ? 0xff800000u : 0x7f800000u;

  int exponent = -1000;
  for (int i = 0; i <= kMmaDepth; ++i)
    if (aligns[i] && terms[i].exponent > exponent) exponent = terms[i].exponent;
  std::int64_t sum = 0;
  for (const Term& term : terms) {
    if (term.significand == 0) continue;
    const int shift = model.fraction_bits - term.fraction - (exponent - term.exponent);
    const std::uint64_t cut = shift <= -64 ? 0
                              : shift < 0  ? term.significand >> -shift
                                           : term.significand << shift;
    sum += term.negative ? -static_cast<std::int64_t>(cut) : static_cast<std::int64_t>(cut);
  }
  return mma_detail::cut(sum, exponent, model);
}

// By the default model.
inline std::uint32_t mma_step(const std::uint16_t* a, const std::uint16_t* b, std::uint32_t c) {
  std::uint32_t out;
  return mma_detail::finite_step(a, b, c, &out) ? out : mma_step(a, b, c, MmaModel{});
}

inline float mma_step(const std::uint16_t* a, const std::uint16_t* b, float c,
                      const MmaModel& model) {
  std::uint32_t bits;
  std::memcpy(&bits, &c, sizeof(bits));
  bits = mma_step(a, b, bits, model);
  std::memcpy(&c, &bits, sizeof(bits));
  return c;
}

inline float mma_step(const std::uint16_t* a, const std::uint16_t* b, float c) {
  std::uint32_t bits;
  std::memcpy(&bits, &c, sizeof(bits));
  bits = mma_step(a, b, bits);
  std::memcpy(&c, &bits, sizeof(bits));
  return c;
}

// The contract chain: an accumulator started at 0, groups of sixteen in ascending k, the last one
// padded with zeros.
inline float mma_chain(const std::uint16_t* a, const std::uint16_t* b, std::int64_t depth,
                       const MmaModel& model = {}) {
  float acc = 0.0f;
  for (std::int64_t k = 0; k < depth; k += kMmaDepth) {
    std::uint16_t x[kMmaDepth] = {}, y[kMmaDepth] = {};
    for (int i = 0; i < kMmaDepth && k + i < depth; ++i) {
      x[i] = a[k + i];
      y[i] = b[k + i];
    }
    acc = mma_step(x, y, acc, model);
  }
  return acc;
}

}  // namespace tml
