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

// s = fma(x . w, scale, s or 0) for an even run of vectors.
template <class T, bool kRequest>
void score_rows(float* s, const KStep* w, std::ptrdiff_t w_stride, int num_vecs, const KStep* x,
                int num_rows, std::int64_t num_steps, float scale, bool has_bias, Ahead ahead) {
  const Vec factor = set1(scale);
  multiply_rows<sizeof(T) == 2, kRequest>(
      w, w_stride, num_vecs, x, num_rows, num_steps, ahead, [&](int m, int v, Vec acc) TML_LAMBDA {
        float* out = s + m * kRowSteps + v * 16;
        store(out, fma(acc, factor, has_bias ? load(out) : zero()));
      });
}

TML_INLINE void store_probs(KStep* p, Vec a, float) {
  alignas(64) float values[16];
  store(values, a);
  std::memcpy(p, values, sizeof(values));
}
TML_INLINE void store_probs(KStep* p, Vec a, std::uint16_t) {
  alignas(32) std::uint16_t values[16];
  store_bf16(values, a);
  std::memcpy(p, values, sizeof(values));
}

// p = round(exp(s - m)) over the visible keys of each row, with its m and its sum of unrounded p.
template <class T>
void softmax_rows(const float* s, KStep* p, int num_rows, const Visible& visible, float* m,
                  float* l) {
  constexpr int kProbSteps = 16 * static_cast<int>(sizeof(T)) / 4;
  for (int row = 0; row < num_rows; ++row, s += kRowSteps, p += kRowSteps) {
    const int first = visible.first[row], last = visible.last[row];
    if (first >= last) {
      m[row] = kMasked;
      l[row] = 0.0f;
      for (int v = 0; v < kUnitVecs; ++v) store_probs(p + v * kProbSteps, zero(), T{});
      continue;
    }
    Vec x[kUnitVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kUnitVecs; ++v) x[v] = load(s + v * 16);
    if (first > 0 || last < kUnit) {
      const Vec fill = set1(kMasked);
#pragma GCC unroll 8
      for (int v = 0; v < kUnitVecs; ++v)
        x[v] = keep_range(x[v], first - v * 16, last - v * 16, fill);
    }
    const float top = hmax(max(max(max(x[0], x[1]), max(x[2], x[3])),
                               max(max(x[4], x[5]), max(x[6], x[7]))));
    const Vec shift = set1(top);
#pragma GCC unroll 8
    for (int v = 0; v < kUnitVecs; ++v) {
      x[v] = exp(sub(x[v], shift));
      store_probs(p + v * kProbSteps, x[v], T{});
    }
    m[row] = top;
    l[row] = hsum(add(add(add(x[0], x[1]), add(x[2], x[3])), add(add(x[4], x[5]), add(x[6], x[7]))));
  }
}

// The scalar half of fold(a, b) for num_rows rows: a.m and a.l, and the two weights of the values.
TML_INLINE void fold_sums(const Partial& a, const Partial& b, int num_rows, float* weight_a,
                          float* weight_b) {
  for (int row = 0; row < num_rows; row += 16) {
    const Vec ma = load(a.m + row), mb = load(b.m + row);
    const Vec m = max(ma, mb);
    const Vec wa = exp(sub(ma, m)), wb = exp(sub(mb, m));
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
