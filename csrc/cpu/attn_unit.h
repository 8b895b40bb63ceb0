// One attention unit (the 128 keys of a page) for the query rows of one KV head: scores, softmax,
// weighted values, fold. The arithmetic of ops/session_attn.h and nothing about schedules.
#pragma once

#include "cpu/attn_rows.h"
#include "ops/session_attn.h"

namespace tml::cpu::TML_ISA_NS {

inline constexpr int kUnit = contract::kPageLen;
inline constexpr int kUnitVecs = kUnit / 16;
// Query rows (tokens x heads of a group) that share one pass over the keys.
inline constexpr int kMaxRows = 64;
inline constexpr float kMasked = -1e30f;
static_assert(kUnitVecs == 8, "the sum of a row's probabilities is written for eight vectors");

// Max, sum and weighted values of some keys, per row: an operand of fold.
struct Partial {
  float* m;  // [kMaxRows]
  float* l;  // [kMaxRows]
  float* o;  // [rows][head_dim]
};

// Keys of a unit that each row sees: [first, last), empty where first >= last.
struct Visible {
  int first[kMaxRows];
  int last[kMaxRows];
};

// s = fma(q . k, scale, s or 0) for a run of the unit's vectors.
template <class T>
void score_rows(float* s, const KStep* k_block, int num_vecs, const KStep* q, int num_rows,
                std::int64_t num_steps, float scale, bool has_bias, Ahead ahead) {
  const Vec factor = set1(scale);
  multiply_rows<sizeof(T) == 2, true>(k_block, kUnit, num_vecs, q, num_rows, num_steps, ahead,
                                      [&](int m, int v, Vec acc) TML_LAMBDA {
                                        float* out = s + m * kRowSteps + v * 16;
                                        store(out, fma(acc, factor, has_bias ? load(out) : zero()));
                                      });
}

// exp of vec.h for x <= 0: the clamps it leaves out change no bit there.
TML_INLINE Vec exp_of_negative(Vec x) {
  const Vec magic = set1(12582912.0f);
  const Vec shifted = fma(x, set1(1.44269504088896341f), magic);
  const Vec n = sub(shifted, magic);
  Vec r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  const Vec y = add(fma(p, mul(r, r), r), set1(1.0f));
#if TML_ISA_LEVEL >= 2
  // y * 2^n, and 0 below the range in the same instruction.
  const __mmask16 keep = _mm512_cmp_ps_mask(x.v, set1(-87.0f).v, _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(keep, y.v, n.v)};
#else
  return where_less(x, set1(-87.0f), zero(), mul(y, exponent_scale(shifted)));
#endif
}

// m = max of each row over its visible keys; the scores of the others become kMasked.
TML_INLINE void max_rows(float* s, int num_rows, const Visible* visible, float* m) {
  for (int row = 0; row < num_rows; ++row, s += kRowSteps) {
    Vec x[kUnitVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kUnitVecs; ++v) x[v] = load(s + v * 16);
    if (visible != nullptr) {
      const int first = visible->first[row], last = visible->last[row];
#pragma GCC unroll 8
      for (int v = 0; v < kUnitVecs; ++v) {
        x[v] = keep_range(x[v], first - v * 16, last - v * 16, set1(kMasked));
        store(s + v * 16, x[v]);
      }
    }
    m[row] =
        hmax(max(max(max(x[0], x[1]), max(x[2], x[3])), max(max(x[4], x[5]), max(x[6], x[7]))));
  }
}

// The probabilities of 32 keys as k-steps, rounded to the type of the last argument.
TML_INLINE void store_probs(KStep* p, Vec a, Vec b, float) {
  alignas(64) float values[32];
  store(values, a);
  store(values + 16, b);
  std::memcpy(p, values, sizeof(values));
}
TML_INLINE void store_probs(KStep* p, Vec a, Vec b, std::uint16_t) {
#if TML_ISA_LEVEL >= 3
  const __m512bh values = _mm512_cvtne2ps_pbh(b.v, a.v);
#else
  alignas(64) std::uint16_t values[32];
  store_bf16(values, a);
  store_bf16(values + 16, b);
#endif
  std::memcpy(p, &values, sizeof(values));
}

// p = round(exp(s - m)) over the visible keys of each row (null: all), with m and the sum of
// unrounded p. The maxima come first for all rows: they are latency, the rest is throughput.
template <class T>
void softmax_rows(float* s, KStep* p, int num_rows, const Visible* visible, float* m, float* l) {
  constexpr int kPairs = kUnitVecs / 2;
  constexpr int kPairSteps = 32 * static_cast<int>(sizeof(T)) / 4;
  max_rows(s, num_rows, visible, m);
  for (int row = 0; row < num_rows; ++row, s += kRowSteps, p += kRowSteps) {
    if (visible != nullptr && visible->first[row] >= visible->last[row]) {
      l[row] = 0.0f;
      for (int v = 0; v < kPairs; ++v) store_probs(p + v * kPairSteps, zero(), zero(), T{});
      continue;
    }
    const Vec shift = set1(m[row]);
    Vec sums[kPairs];
#pragma GCC unroll 4
    for (int v = 0; v < kPairs; ++v) {
      const Vec a = exp_of_negative(sub(load(s + v * 32), shift));
      const Vec b = exp_of_negative(sub(load(s + v * 32 + 16), shift));
      store_probs(p + v * kPairSteps, a, b, T{});
      sums[v] = add(a, b);
    }
    l[row] = hsum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  }
}

// The scalar half of fold(a, b) for num_rows rows: a.m and a.l, and the two weights of the values.
TML_INLINE void fold_sums(const Partial& a, const Partial& b, int num_rows, float* weight_a,
                          float* weight_b) {
  for (int row = 0; row < num_rows; row += 16) {
    const Vec ma = load(a.m + row), mb = load(b.m + row);
    const Vec m = max(ma, mb);
    const Vec wa = exp_of_negative(sub(ma, m)), wb = exp_of_negative(sub(mb, m));
    store(weight_a + row, wa);
    store(weight_b + row, wb);
    store(a.m + row, m);
    store(a.l + row, fma(load(b.l + row), wb, mul(load(a.l + row), wa)));
  }
}

TML_INLINE Vec fold_values(Vec a, Vec wa, Vec b, Vec wb) { return fma(b, wb, mul(a, wa)); }

// o = fold_values(o, p . V) over num_steps k-steps of a V block.
template <class T>
void weigh_values(float* o, const KStep* v_block, std::int64_t head_dim, const KStep* p,
                  int num_rows, std::int64_t num_steps, const float* weight_o,
                  const float* weight_u, Ahead ahead) {
  multiply_rows<sizeof(T) == 2, true>(
      v_block, head_dim, static_cast<int>(head_dim / 16), p, num_rows, num_steps, ahead,
      [&](int m, int v, Vec acc) TML_LAMBDA {
        float* out = o + m * head_dim + v * 16;
        store(out, fold_values(load(out), set1(weight_o[m]), acc, set1(weight_u[m])));
      });
}

// a = fold(a, b).
TML_INLINE void fold(const Partial& a, const Partial& b, int num_rows, std::int64_t head_dim) {
  alignas(64) float weight_a[kMaxRows], weight_b[kMaxRows];
  fold_sums(a, b, num_rows, weight_a, weight_b);
  for (int row = 0; row < num_rows; ++row)
    for (std::int64_t d = row * head_dim; d < (row + 1) * head_dim; d += 16)
      store(a.o + d,
            fold_values(load(a.o + d), set1(weight_a[row]), load(b.o + d), set1(weight_b[row])));
}

// The neutral element of fold.
TML_INLINE void clear(const Partial& a, int num_rows, std::int64_t head_dim) {
  for (int row = 0; row < num_rows; row += 16) {
    store(a.m + row, set1(kMasked));
    store(a.l + row, zero());
  }
  for (std::int64_t d = 0; d < num_rows * head_dim; d += 16) store(a.o + d, zero());
}

}  // namespace tml::cpu::TML_ISA_NS
