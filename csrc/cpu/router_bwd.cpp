// router_bwd: a token has few outputs with a gradient, so both products run over lists: threads
// split tokens for d l and dx, then columns of dw, which every output's list of tokens adds to.
#include "ops/router_bwd.h"

#include "core/contract.h"
#include "cpu/arena.h"
#include "cpu/cpu.h"
#include "cpu/parallel.h"
#include "cpu/router_terms.h"
#include "ops/router.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

constexpr std::int64_t kBlock = contract::kGradBlock;
constexpr int kVecs = 8;  // vectors of a row in registers at a time
// Below this many multiply-adds a second thread costs more than it saves.
constexpr std::int64_t kMinParallelWork = 64 << 10;

// The outputs of a token that have gradients, ascending: its choice and the shared ones, or all.
struct Terms {
  const RouterBwdParams& p;
  std::int64_t num_outputs = p.num_experts + p.num_shared;
  std::int64_t per_token = p.dlogits != nullptr ? num_outputs : p.top_k + p.num_shared;

  std::int64_t output(std::int64_t token, std::int64_t i) const {
    if (p.dlogits != nullptr) return i;
    return chosen(token, i);
  }
  std::int64_t chosen(std::int64_t token, std::int64_t i) const {
    return i < p.top_k ? p.expert_ids[token * p.top_k + i] : p.num_experts + i - p.top_k;
  }
};

// d l of one token, as long as its terms; returns its part of the scale's gradient.
float logit_grads(const Terms& terms, std::int64_t token, float* dl) {
  const RouterBwdParams& p = terms.p;
  const float* logits = p.logits + token * terms.num_outputs;
  const int count = p.top_k + p.num_shared;
  float share[kRouterMaxTopK + kRouterMaxOutputs];
  const float sum =
      softmax_terms(count, [&](int i) { return logits[terms.chosen(token, i)]; }, share);
  const auto grad_of = [&](int i) {
    return i < p.top_k ? p.dweights[token * p.top_k + i]
                       : p.dgammas[token * p.num_shared + i - p.top_k];
  };
  float mean = 0.0f;
  for (int i = 0; i < count; ++i) {
    share[i] = share[i] / sum;
    mean = __builtin_fmaf(share[i], grad_of(i), mean);
  }
  if (p.dlogits != nullptr)
    for (std::int64_t n = 0; n < terms.num_outputs; ++n)
      dl[n] = p.dlogits[token * terms.num_outputs + n];
  for (int i = 0; i < count; ++i) {
    const std::int64_t n = terms.chosen(token, i);
    const float grad = p.scale * share[i] * (grad_of(i) - mean) / (1.0f + exp1(logits[n]));
    if (p.dlogits != nullptr)
      dl[n] = dl[n] + grad;
    else
      dl[i] = grad;
  }
  return mean;
}

// body(first column, number of vectors) over columns [begin, end) in vectors of sixteen.
template <class Body>
void for_columns(Range vecs, const Body& body) {
  for (std::int64_t vec = vecs.begin; vec < vecs.end; vec += kVecs)
    body(vec * 16, static_cast<int>(vecs.end - vec < kVecs ? vecs.end - vec : kVecs));
}

template <class T>
void router_bwd_typed(const RouterBwdParams& p) {
  const Terms terms{p};
  const std::int64_t num_terms = p.num_tokens * terms.per_token;
  const std::int64_t vecs = ceil_div(p.in_dim, 16);
  float *dl = nullptr, *sorted = nullptr, *scale_part = nullptr;
  std::int32_t *token_of = nullptr, *offset = nullptr;
  Arena arena(Scratch::kOp);
  arena.take(&dl, num_terms)
      .take(&sorted, num_terms)
      .take(&token_of, num_terms)
      .take(&offset, terms.num_outputs + 2)
      .take(&scale_part, p.num_tokens)
      .commit();
  const auto* x = static_cast<const T*>(p.x);
  auto* dx = static_cast<T*>(p.dx);
  const bool small = num_terms * p.in_dim < kMinParallelWork;
  parallel(small ? 1 : p.num_threads, [&](int thread, int num_threads) {
    const auto barrier = [num_threads] { team_barrier(); };
    const Range own = split(p.num_tokens, thread, num_threads);
    for (std::int64_t t = own.begin; t < own.end; ++t) {
      float* grads = dl + t * terms.per_token;
      scale_part[t] = logit_grads(terms, t, grads);
      for_columns({0, vecs}, [&](std::int64_t col, int count) {
        Vec acc[kVecs];
        for (Vec& a : acc) a = zero();
        for (std::int64_t i = 0; i < terms.per_token; ++i) {
          const float* w = p.weight + terms.output(t, i) * p.in_dim + col;
          const Vec grad = set1(grads[i]);
          for (int v = 0; v < count; ++v)
            acc[v] = fma(grad, load_rest(w + v * 16, p.in_dim - col - v * 16), acc[v]);
        }
        for (int v = 0; v < count; ++v)
          store_rest(dx + t * p.in_dim + col + v * 16, acc[v], p.in_dim - col - v * 16);
      });
    }
    barrier();
    if (thread == 0) {  // the tokens of every output, ascending
      std::int32_t* cursor = offset + 1;
      for (std::int64_t n = 0; n <= terms.num_outputs + 1; ++n) offset[n] = 0;
      for (std::int64_t t = 0; t < p.num_tokens; ++t)
        for (std::int64_t i = 0; i < terms.per_token; ++i) cursor[terms.output(t, i) + 1] += 1;
      for (std::int64_t n = 0; n < terms.num_outputs; ++n) cursor[n + 1] += cursor[n];
      for (std::int64_t t = 0; t < p.num_tokens; ++t)
        for (std::int64_t i = 0; i < terms.per_token; ++i) {
          const std::int32_t slot = cursor[terms.output(t, i)]++;
          token_of[slot] = static_cast<std::int32_t>(t);
          sorted[slot] = dl[t * terms.per_token + i];
        }
      float total = 0.0f;
      for (std::int64_t begin = 0; begin < p.num_tokens; begin += kBlock) {
        float block = 0.0f;
        for (std::int64_t t = begin; t < p.num_tokens && t < begin + kBlock; ++t)
          block = block + scale_part[t];
        total = total + block;
      }
      *p.dscale = total;
    }
    barrier();
    const Range columns = split(vecs, thread, num_threads);
    for (std::int64_t n = 0; n < terms.num_outputs; ++n)
      for_columns(columns, [&](std::int64_t col, int count) {
        Vec acc[kVecs], total[kVecs];
        for (int v = 0; v < kVecs; ++v) acc[v] = total[v] = zero();
        std::int64_t block = 0;
        const auto promote = [&] {
          for (int v = 0; v < kVecs; ++v) {
            total[v] = add(total[v], acc[v]);
            acc[v] = zero();
          }
        };
        for (std::int64_t slot = offset[n]; slot < offset[n + 1]; ++slot) {
          const std::int64_t t = token_of[slot];
          if (t / kBlock != block) {
            promote();
            block = t / kBlock;
          }
          const T* row = x + t * p.x_row_stride + col;
          const Vec grad = set1(sorted[slot]);
          if (count == kVecs && col + kVecs * 16 <= p.in_dim) {
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) acc[v] = fma(grad, load_as_f32(row + v * 16), acc[v]);
          } else {
            for (int v = 0; v < count; ++v)
              acc[v] = fma(grad, load_rest(row + v * 16, p.in_dim - col - v * 16), acc[v]);
          }
        }
        promote();
        for (int v = 0; v < count; ++v)
          store_rest(p.dw + n * p.in_dim + col + v * 16, total[v], p.in_dim - col - v * 16);
      });
  });
}

}  // namespace

void router_bwd(const RouterBwdParams& p) {
  if (p.dtype == DType::kF32) return TML_F32(router_bwd, router_bwd_typed<float>)(p);
  router_bwd_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
