// router: the product is linear's (packed token tiles against weight panels), split by tokens, or
// by panels when tokens are few; then one thread a token, whose scores fit in L1.
#include "ops/router.h"

#include "core/memory.h"
#include "cpu/cpu.h"
#include "cpu/panel_rows.h"
#include "cpu/parallel.h"
#include "cpu/router_terms.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

constexpr std::int64_t kPanel = contract::kPanel;
// Below this many multiply-adds a second thread costs more than it saves.
constexpr std::int64_t kMinParallelWork = 64 << 10;

// The top_k of choice[0, count) as ascending ids.
void choose(const float* choice, int count, int top_k, std::int32_t* ids) {
  float best[kRouterMaxTopK];
  std::int32_t id_of[kRouterMaxTopK];
  int taken = 0;
  const auto insert = [&](int at, float score, int id) {
    for (int i = taken < top_k ? taken++ : top_k - 1; i > at; --i) {
      best[i] = best[i - 1];
      id_of[i] = id_of[i - 1];
    }
    best[at] = score;
    id_of[at] = id;
  };
  for (int id = 0; id < count; ++id) {
    const float score = choice[id];
    if (score != score || (taken == top_k && !(score > best[taken - 1]))) continue;
    int at = taken < top_k ? taken : top_k - 1;
    while (at > 0 && score > best[at - 1]) --at;
    insert(at, score, id);
  }
  for (int id = 0; id < count && taken < top_k; ++id)
    if (choice[id] != choice[id]) insert(taken, choice[id], id);
  for (int i = 0; i < top_k; ++i) {  // insertion sort by id
    int at = i;
    for (; at > 0 && ids[at - 1] > id_of[i]; --at) ids[at] = ids[at - 1];
    ids[at] = id_of[i];
  }
}

template <class T>
void route_token(const RouterParams& p, const float* logits, std::int64_t token) {
  alignas(64) float choice[kRouterMaxOutputs];
  for (int n = 0; n < p.num_experts; n += 16) {
    const int count = p.num_experts - n < 16 ? p.num_experts - n : 16;
    const Vec l = load_first(logits + n, count);
    const Vec score = div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), l))));
    store_first(choice + n, add(score, load_first(p.bias + n, count)), count);
  }
  std::int32_t* ids = p.expert_ids + token * p.top_k;
  choose(choice, p.num_experts, p.top_k, ids);

  const int num_terms = p.top_k + p.num_shared;
  float term[kRouterMaxTopK + kRouterMaxOutputs];
  const auto logit_of = [&](int i) {
    return logits[i < p.top_k ? ids[i] : p.num_experts + i - p.top_k];
  };
  const float sum = softmax_terms(num_terms, logit_of, term);
  for (int i = 0; i < num_terms; ++i) {
    const float weight = to_f32(rounded<T>(term[i] / sum * p.scale));
    if (i < p.top_k)
      p.weights[token * p.top_k + i] = weight;
    else
      p.gammas[token * p.num_shared + i - p.top_k] = weight;
  }
}

// Rows [begin, end) of x, upcast and packed tile by tile as multiply_tiles reads them.
template <class T>
void pack_upcast(const RouterParams& p, Range rows, KStep* packed) {
  const TileSplit tiles(rows.end - rows.begin);
  for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
    KStep* out = packed + tiles.begin(tile) * p.in_dim;
    for (int m = 0; m < tiles.rows(tile); ++m) {
      const std::int64_t row = rows.begin + tiles.begin(tile) + m;
      const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
      for (std::int64_t k = 0; k < p.in_dim; ++k)
        out[k * tiles.rows(tile) + m] = bits_of(to_f32(x[k]));
    }
  }
}

template <class T>
void router_typed(const RouterParams& p) {
  const std::int64_t num_outputs = p.num_experts + p.num_shared;
  const std::int64_t num_panels = ceil_div(num_outputs, kPanel);
  const std::int64_t packed_bytes = ceil_div(p.num_tokens * p.in_dim * 4, 64) * 64;
  const std::int64_t logits_bytes = p.logits == nullptr ? p.num_tokens * num_outputs * 4 : 0;
  auto* base = static_cast<char*>(
      scratch(Scratch::kOp, static_cast<std::size_t>(packed_bytes + logits_bytes)));
  auto* packed = reinterpret_cast<KStep*>(base);
  float* logits = p.logits == nullptr ? reinterpret_cast<float*>(base + packed_bytes) : p.logits;
  const auto multiply = [&](Range rows, Range panels) {
    multiply_tiles<false>(static_cast<const KStep*>(p.weight), p.in_dim, panels.begin, panels.end,
                          packed + rows.begin * p.in_dim, rows.end - rows.begin,
                          [&](std::int64_t m, std::int64_t panel, int vec, Vec acc) {
                            const std::int64_t n = panel * kPanel + vec * 16;
                            float* out = logits + (rows.begin + m) * num_outputs + n;
                            if (n + 16 <= num_outputs)
                              store(out, acc);
                            else if (n < num_outputs)
                              store_first(out, acc, static_cast<int>(num_outputs - n));
                          });
  };
  const bool small = p.num_tokens * p.in_dim * num_outputs < kMinParallelWork;
  parallel(small ? 1 : p.num_threads, [&](int thread, int num_threads) {
    const Range own = split(p.num_tokens, thread, num_threads);
    const Range all{0, p.num_tokens};
    if (p.num_tokens >= kTileRows * num_threads || num_threads == 1) {
      pack_upcast<T>(p, own, packed + own.begin * p.in_dim);
      multiply(own, {0, num_panels});
    } else {  // too few rows to split: every thread takes some of the outputs
      if (thread == 0) pack_upcast<T>(p, all, packed);
      team_barrier();
      multiply(all, split(num_panels, thread, num_threads));
      team_barrier();
    }
    for (std::int64_t token = own.begin; token < own.end; ++token)
      route_token<T>(p, logits + token * num_outputs, token);
  });
}

}  // namespace

void router(const RouterParams& p) {
  if (p.num_tokens == 0) return;
  if (p.dtype == DType::kF32) return TML_F32(router, router_typed<float>)(p);
  router_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
