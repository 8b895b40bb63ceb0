// Sixteen fp32 lanes on every instruction set, with the same bits on each. Included once per ISA
// build of a kernel file; everything lives in that ISA's namespace, so the linker can never keep
// one level's code for another. TML_ISA_LEVEL: 0 scalar, 1 AVX2+FMA, 2 AVX-512, 3 AVX-512 + BF16.
#pragma once

#if TML_ISA_LEVEL >= 1
#include <immintrin.h>
#else
#include <xmmintrin.h>
#endif

#include <cstdint>
#include <cstring>

#define TML_INLINE inline __attribute__((always_inline))

namespace tml::cpu::TML_ISA_NS {

// Denormals count as zero, in and out, as in VDPBF16PS; per thread, restored on exit.
class FlushDenormals {
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned saved_;
};

TML_INLINE std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
TML_INLINE float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
TML_INLINE float bf16_to_f32(std::uint16_t x) {
  return float_of(static_cast<std::uint32_t>(x) << 16);
}
// Round to nearest even, denormals to signed zero, NaN kept quiet: VCVTNEPS2BF16.
TML_INLINE std::uint16_t f32_to_bf16(float x) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t exponent = bits & 0x7f800000u;
  if (exponent == 0) return static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  if (exponent == 0x7f800000u && (bits & 0x007fffffu) != 0)
    return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if TML_ISA_LEVEL >= 2

struct Vec {
  __m512 v;
};
TML_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
TML_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
TML_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
TML_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
TML_INLINE __mmask16 lane_mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
TML_INLINE Vec load_first(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(lane_mask(n), p)};
}
TML_INLINE void store_first(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, lane_mask(n), a.v); }
TML_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
TML_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
TML_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
TML_INLINE Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
TML_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
TML_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where unordered
TML_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }  // b where unordered
TML_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
TML_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
// a < b ? x : y
TML_INLINE Vec where_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
// Lane i keeps a if first <= i < last, else takes fill.
TML_INLINE Vec keep_range(Vec a, int first, int last, Vec fill) {
  first = first < 0 ? 0 : (first > 16 ? 16 : first);
  last = last < 0 ? 0 : (last > 16 ? 16 : last);
  const auto mask = static_cast<__mmask16>(((1u << last) - 1u) & ~((1u << first) - 1u));
  return {_mm512_mask_blend_ps(mask, fill.v, a.v)};
}
TML_INLINE Vec exponent_scale(Vec shifted) {  // 2^n from the magic-number sum of exp()
  return {_mm512_castsi512_ps(_mm512_add_epi32(
      _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23), _mm512_set1_epi32(0x3f800000)))};
}
TML_INLINE Vec load_bf16(const std::uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
TML_INLINE __m256i pack_bf16(Vec a) {
#if TML_ISA_LEVEL >= 3
  const __m256bh packed = _mm512_cvtneps_pbh(a.v);
  __m256i out;
  std::memcpy(&out, &packed, sizeof(out));
  return out;
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i exponent = _mm512_and_si512(bits, _mm512_set1_epi32(0x7f800000));
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  __m512i out = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  out = _mm512_mask_or_epi32(out, nan, high, _mm512_set1_epi32(0x40));
  const __mmask16 tiny = _mm512_testn_epi32_mask(exponent, exponent);
  out = _mm512_mask_and_epi32(out, tiny, high, _mm512_set1_epi32(0x8000));
  return _mm512_cvtepi32_epi16(out);
#endif
}
TML_INLINE void store_bf16(std::uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_bf16(a));
}
TML_INLINE float hsum(Vec a) {
  const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
TML_INLINE float hmax(Vec a) { return _mm512_reduce_max_ps(a.v); }

#elif TML_ISA_LEVEL == 1

struct Vec {
  __m256 lo, hi;
};
TML_INLINE Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
TML_INLINE Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
TML_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
TML_INLINE void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
TML_INLINE Vec load_first(const float* p, int n) {
  alignas(32) float buffer[16] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
TML_INLINE void store_first(float* p, Vec a, int n) {
  alignas(32) float buffer[16];
  store(buffer, a);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}
TML_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
TML_INLINE Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
TML_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
TML_INLINE Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
TML_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
TML_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
TML_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
TML_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
TML_INLINE Vec abs(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
TML_INLINE Vec where_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
TML_INLINE Vec keep_range(Vec a, int first, int last, Vec fill) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i lane_hi = _mm256_add_epi32(lane, _mm256_set1_epi32(8));
  const __m256i before = _mm256_set1_epi32(first - 1);
  const __m256i end = _mm256_set1_epi32(last);
  const __m256i keep_lo =
      _mm256_and_si256(_mm256_cmpgt_epi32(lane, before), _mm256_cmpgt_epi32(end, lane));
  const __m256i keep_hi =
      _mm256_and_si256(_mm256_cmpgt_epi32(lane_hi, before), _mm256_cmpgt_epi32(end, lane_hi));
  return {_mm256_blendv_ps(fill.lo, a.lo, _mm256_castsi256_ps(keep_lo)),
          _mm256_blendv_ps(fill.hi, a.hi, _mm256_castsi256_ps(keep_hi))};
}
TML_INLINE __m256 exponent_scale_half(__m256 shifted) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23),
                                              _mm256_set1_epi32(0x3f800000)));
}
TML_INLINE Vec exponent_scale(Vec shifted) {
  return {exponent_scale_half(shifted.lo), exponent_scale_half(shifted.hi)};
}
TML_INLINE __m256 widen_bf16(__m128i raw) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
TML_INLINE Vec load_bf16(const std::uint16_t* p) {
  return {widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
TML_INLINE void store_bf16(std::uint16_t* p, Vec a) {
  alignas(32) float buffer[16];
  store(buffer, a);
  for (int i = 0; i < 16; ++i) p[i] = f32_to_bf16(buffer[i]);
}
TML_INLINE float hsum(Vec a) {
  const __m256 s8 = _mm256_add_ps(a.lo, a.hi);
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
TML_INLINE float hmax(Vec a) {
  const __m256 m8 = _mm256_max_ps(a.lo, a.hi);
  const __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(m8), _mm256_extractf128_ps(m8, 1));
  const __m128 m2 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
  return _mm_cvtss_f32(_mm_max_ss(m2, _mm_shuffle_ps(m2, m2, 1)));
}

#else

struct Vec {
  float v[16];
};
#define TML_LANES(expression)                           \
  Vec out;                                              \
  for (int i = 0; i < 16; ++i) out.v[i] = (expression); \
  return out
TML_INLINE Vec zero() { TML_LANES(0.0f); }
TML_INLINE Vec set1(float x) { TML_LANES(x); }
TML_INLINE Vec load(const float* p) { TML_LANES(p[i]); }
TML_INLINE void store(float* p, Vec a) {
  for (int i = 0; i < 16; ++i) p[i] = a.v[i];
}
TML_INLINE Vec load_first(const float* p, int n) { TML_LANES(i < n ? p[i] : 0.0f); }
TML_INLINE void store_first(float* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}
TML_INLINE Vec add(Vec a, Vec b) { TML_LANES(a.v[i] + b.v[i]); }
TML_INLINE Vec sub(Vec a, Vec b) { TML_LANES(a.v[i] - b.v[i]); }
TML_INLINE Vec mul(Vec a, Vec b) { TML_LANES(a.v[i] * b.v[i]); }
TML_INLINE Vec div(Vec a, Vec b) { TML_LANES(a.v[i] / b.v[i]); }
TML_INLINE Vec fma(Vec a, Vec b, Vec c) { TML_LANES(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
TML_INLINE Vec max(Vec a, Vec b) { TML_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
TML_INLINE Vec min(Vec a, Vec b) { TML_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
TML_INLINE Vec sqrt(Vec a) { TML_LANES(_mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(a.v[i])))); }
TML_INLINE Vec abs(Vec a) { TML_LANES(float_of(bits_of(a.v[i]) & 0x7fffffffu)); }
TML_INLINE Vec where_less(Vec a, Vec b, Vec x, Vec y) {
  TML_LANES(a.v[i] < b.v[i] ? x.v[i] : y.v[i]);
}
TML_INLINE Vec keep_range(Vec a, int first, int last, Vec fill) {
  TML_LANES(i >= first && i < last ? a.v[i] : fill.v[i]);
}
TML_INLINE Vec exponent_scale(Vec shifted) {
  TML_LANES(float_of((bits_of(shifted.v[i]) << 23) + 0x3f800000u));
}
TML_INLINE Vec load_bf16(const std::uint16_t* p) { TML_LANES(bf16_to_f32(p[i])); }
TML_INLINE void store_bf16(std::uint16_t* p, Vec a) {
  for (int i = 0; i < 16; ++i) p[i] = f32_to_bf16(a.v[i]);
}
TML_INLINE float hsum(Vec a) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] + a.v[i + half];
  return a.v[0];
}
TML_INLINE float hmax(Vec a) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
  return a.v[0];
}
#undef TML_LANES

#endif

// ---- element access by type: float or bf16 (std::uint16_t) ----

TML_INLINE Vec load_as_f32(const float* p) { return load(p); }
TML_INLINE Vec load_as_f32(const std::uint16_t* p) { return load_bf16(p); }
TML_INLINE Vec load_first_as_f32(const float* p, int n) { return load_first(p, n); }
TML_INLINE Vec load_first_as_f32(const std::uint16_t* p, int n) {
  alignas(64) std::uint16_t buffer[16] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load_bf16(buffer);
}
TML_INLINE void store_rounded(float* p, Vec a) { store(p, a); }
TML_INLINE void store_rounded(std::uint16_t* p, Vec a) { store_bf16(p, a); }
TML_INLINE void store_first_rounded(float* p, Vec a, int n) { store_first(p, a, n); }
TML_INLINE void store_first_rounded(std::uint16_t* p, Vec a, int n) {
  alignas(64) std::uint16_t buffer[16];
  store_bf16(buffer, a);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}
// The first min(n, 16) elements of a row's rest; absent lanes are zero.
template <class T>
TML_INLINE Vec load_rest(const T* p, std::int64_t n) {
  return n >= 16 ? load_as_f32(p) : load_first_as_f32(p, static_cast<int>(n));
}
template <class T>
TML_INLINE void store_rest(T* p, Vec a, std::int64_t n) {
  if (n >= 16)
    store_rounded(p, a);
  else
    store_first_rounded(p, a, static_cast<int>(n));
}
TML_INLINE float to_f32(float x) { return x; }
TML_INLINE float to_f32(std::uint16_t x) { return bf16_to_f32(x); }
template <class T>
TML_INLINE T rounded(float x);
template <>
TML_INLINE float rounded<float>(float x) {
  return x;
}
template <>
TML_INLINE std::uint16_t rounded<std::uint16_t>(float x) {
  return f32_to_bf16(x);
}
// fp32 -> T -> fp32: a rounding point kept in registers.
template <class T>
TML_INLINE Vec round_through(Vec a);
template <>
TML_INLINE Vec round_through<float>(Vec a) {
  return a;
}
template <>
TML_INLINE Vec round_through<std::uint16_t>(Vec a) {
#if TML_ISA_LEVEL >= 2
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(pack_bf16(a)), 16))};
#else
  alignas(64) std::uint16_t buffer[16];
  store_bf16(buffer, a);
  return load_bf16(buffer);
#endif
}

// ---- elementary functions: fixed polynomials, the same bits on every level ----

// e^x within 2 ulp on [-87, 88.3]; exactly 0 below, saturated above, NaN kept.
TML_INLINE Vec exp(Vec x) {
  const Vec magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec clamped = min(set1(88.3f), max(set1(-87.0f), x));
  const Vec shifted = fma(clamped, set1(1.44269504088896341f), magic);
  const Vec n = sub(shifted, magic);
  Vec r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  const Vec y = add(fma(p, mul(r, r), r), set1(1.0f));
  return where_less(x, set1(-87.0f), zero(), mul(y, exponent_scale(shifted)));
}
TML_INLINE float exp1(float x) {
  alignas(64) float out[16];
  store(out, exp(set1(x)));
  return out[0];
}

// ln x within 2 ulp for positive normal x; NaN stays NaN.
TML_INLINE float log1(float x) {
  if (x != x) return x;
  const std::uint32_t bits = bits_of(x);
  int exponent = static_cast<int>(bits >> 23) - 126;
  float m = float_of((bits & 0x007fffffu) | 0x3f000000u);  // [0.5, 1)
  if (m < 0.707106781186547524f) {
    exponent -= 1;
    m = m + m - 1.0f;
  } else {
    m = m - 1.0f;
  }
  const float z = m * m;
  float p = 7.0376836292e-2f;
  p = __builtin_fmaf(p, m, -1.1514610310e-1f);
  p = __builtin_fmaf(p, m, 1.1676998740e-1f);
  p = __builtin_fmaf(p, m, -1.2420140846e-1f);
  p = __builtin_fmaf(p, m, 1.4249322787e-1f);
  p = __builtin_fmaf(p, m, -1.6668057665e-1f);
  p = __builtin_fmaf(p, m, 2.0000714765e-1f);
  p = __builtin_fmaf(p, m, -2.4999993993e-1f);
  p = __builtin_fmaf(p, m, 3.3333331174e-1f);
  const float e = static_cast<float>(exponent);
  float y = p * m * z;
  y = __builtin_fmaf(e, -2.12194440e-4f, y);
  y = __builtin_fmaf(-0.5f, z, y);
  return __builtin_fmaf(e, 0.693359375f, m + y);
}

TML_INLINE Vec silu(Vec x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }

// erf by a rational minimax fit on [-4, 4], saturated outside.
TML_INLINE Vec erf(Vec x) {
  const Vec c = min(set1(4.0f), max(set1(-4.0f), x));
  const Vec z = mul(c, c);
  Vec p = set1(-2.72614225801306e-10f);
  p = fma(p, z, set1(2.77068142495902e-08f));
  p = fma(p, z, set1(-2.10102402082508e-06f));
  p = fma(p, z, set1(-5.69250639462346e-05f));
  p = fma(p, z, set1(-7.34990630326855e-04f));
  p = fma(p, z, set1(-2.95459980854025e-03f));
  p = fma(p, z, set1(-1.60960333262415e-02f));
  Vec q = set1(-1.45660718464996e-05f);
  q = fma(q, z, set1(-2.13374055278905e-04f));
  q = fma(q, z, set1(-1.68282697438203e-03f));
  q = fma(q, z, set1(-7.37332916720468e-03f));
  q = fma(q, z, set1(-1.42647390514189e-02f));
  return div(mul(c, p), q);
}
TML_INLINE Vec gelu(Vec x) {
  const Vec half = mul(x, set1(0.5f));
  return fma(half, erf(mul(x, set1(0.70710678118654752f))), half);
}

}  // namespace tml::cpu::TML_ISA_NS
