// moe: every hit expert's weights are streamed once for all of its tokens, front to back, split
// over threads by (expert, panel). Tokens of an expert are gathered into packed tiles; SwiGLU
// happens in registers; the combine adds rows of a workspace in a fixed order.
#include "ops/moe.h"

#include "cpu/arena.h"
#include "cpu/cpu.h"
#include "cpu/panel_rows.h"
#include "cpu/parallel.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

constexpr std::int64_t kPanel = contract::kPanel;
// Tokens taken together: bounds the workspace; more would not be read more often from memory.
constexpr std::int64_t kMaxTokens = 1024;
// Up to this many rows a panel costs what its bytes cost, whatever the rows.
constexpr std::int64_t kFreeRows = 8;

// The tokens of one expert: slots [slot, slot + num_rows) of the expert-sorted order.
struct Group {
  std::int64_t slot;
  std::int64_t num_rows;
  std::int64_t weight;      // which expert of the packed weights
  std::int64_t first_cost;  // cost of one panel of all groups before this one
  std::int64_t cost() const { return std::max(num_rows, kFreeRows); }
};

struct Plan {
  std::int32_t* token_of_slot;
  std::int32_t* slot_of;       // [num_tokens][top_k + num_shared]
  std::int32_t* pair_of_slot;  // the inverse
  Group* groups;
  std::int64_t num_groups = 0;
  std::int64_t total_cost = 0;
};

// Counting sort by expert, tokens ascending inside one; shared experts come last with every token.
void plan_groups(const MoeParams& p, std::int64_t first, std::int64_t count, std::int32_t* cursor,
                 Plan* plan) {
  const std::int64_t per_token = p.top_k + p.num_shared;
  for (std::int32_t e = 0; e <= p.num_experts; ++e) cursor[e] = 0;
  const std::int32_t* ids = p.expert_ids + first * p.top_k;
  for (std::int64_t i = 0; i < count * p.top_k; ++i) cursor[ids[i] + 1] += 1;
  for (std::int32_t e = 0; e < p.num_experts; ++e) cursor[e + 1] += cursor[e];
  plan->num_groups = 0;
  plan->total_cost = 0;
  const auto add_group = [plan](std::int64_t slot, std::int64_t rows, std::int64_t weight) {
    if (rows == 0) return;
    Group& group = plan->groups[plan->num_groups++];
    group = {slot, rows, weight, plan->total_cost};
    plan->total_cost += group.cost();
  };
  for (std::int32_t e = 0; e < p.num_experts; ++e)
    add_group(cursor[e], cursor[e + 1] - cursor[e], e);
  for (std::int64_t t = 0; t < count; ++t)
    for (std::int32_t j = 0; j < p.top_k; ++j) {
      const std::int32_t slot = cursor[ids[t * p.top_k + j]]++;
      plan->token_of_slot[slot] = static_cast<std::int32_t>(t);
      plan->slot_of[t * per_token + j] = slot;
      plan->pair_of_slot[slot] = static_cast<std::int32_t>(t * per_token + j);
    }
  for (std::int32_t s = 0; s < p.num_shared; ++s) {
    const std::int64_t slot = count * (p.top_k + s);
    add_group(slot, count, p.num_experts + s);
    for (std::int64_t t = 0; t < count; ++t) {
      plan->token_of_slot[slot + t] = static_cast<std::int32_t>(t);
      const std::int64_t pair = t * per_token + p.top_k + s;
      plan->slot_of[pair] = static_cast<std::int32_t>(slot + t);
      plan->pair_of_slot[slot + t] = static_cast<std::int32_t>(pair);
    }
  }
}

// This thread's share of panels_per_group panels of every group: body(group, first, last panel).
template <class Body>
void for_own_panels(const Plan& plan, std::int64_t panels_per_group, int thread, int num_threads,
                    const Body& body) {
  const Range own = split(plan.total_cost * panels_per_group, thread, num_threads);
  for (std::int64_t g = 0; g < plan.num_groups; ++g) {
    const Group& group = plan.groups[g];
    const std::int64_t start = group.first_cost * panels_per_group;
    const std::int64_t cost = group.cost();
    const auto panel_at = [&](std::int64_t position) {
      const std::int64_t panel = ceil_div(std::max<std::int64_t>(position - start, 0), cost);
      return std::min(panel, panels_per_group);
    };
    const std::int64_t begin = panel_at(own.begin), end = panel_at(own.end);
    if (begin < end) body(group, begin, end);
  }
}

template <class T>
void moe_chunk(const MoeParams& p, std::int64_t first, std::int64_t count) {
  constexpr bool kBf16 = sizeof(T) == 2;
  const std::int64_t per_token = p.top_k + p.num_shared;
  const std::int64_t num_slots = count * per_token;
  const std::int64_t steps13 = num_k_steps(p.dtype, p.hidden);
  const std::int64_t steps2 = num_k_steps(p.dtype, p.width);
  const std::int64_t panels13 = ceil_div(p.width, 16);
  const std::int64_t panels2 = ceil_div(p.hidden, kPanel);
  const std::int64_t h_stride = panels13 * 16;
  const std::int64_t out_stride = panels2 * kPanel;

  Arena arena(Scratch::kOp);
  Plan plan;
  float* out = nullptr;
  T* h = nullptr;
  std::int32_t* cursor = nullptr;
  arena.take(&out, num_slots * out_stride)
      .take(&h, num_slots * h_stride)
      .take(&plan.groups, p.num_experts + p.num_shared)
      .take(&plan.token_of_slot, num_slots)
      .take(&plan.slot_of, num_slots)
      .take(&plan.pair_of_slot, num_slots)
      .take(&cursor, p.num_experts + 1)
      .commit();
  plan_groups(p, first, count, cursor, &plan);

  const auto* x = static_cast<const T*>(p.x) + first * p.x_row_stride;
  auto* y = static_cast<T*>(p.y) + first * p.y_row_stride;
  const float* weights = p.weights + first * p.top_k;
  const float* gammas = p.gammas + first * p.num_shared;
  auto* saved = static_cast<T*>(p.gate_up);
  if (saved != nullptr) saved += first * per_token * 2 * p.width;
  const auto* w13 = static_cast<const KStep*>(p.w13);
  const auto* w2 = static_cast<const KStep*>(p.w2);

  parallel(p.num_threads, [&](int thread, int num_threads) {
    const auto barrier = [num_threads] { team_barrier(); };
    for_own_panels(
        plan, panels13, thread, num_threads,
        [&](const Group& group, std::int64_t begin, std::int64_t end) {
          const auto* rows = pack_tiles<T>(group.num_rows, p.hidden, [&](std::int64_t m) {
            return x + plan.token_of_slot[group.slot + m] * p.x_row_stride;
          });
          const bool shared = group.weight >= p.num_experts;
          Vec gate = zero();
          multiply_tiles<kBf16>(
              w13 + group.weight * panels13 * steps13 * kPanel, steps13, begin, end, rows,
              group.num_rows, [&](std::int64_t m, std::int64_t panel, int vec, Vec acc) {
                if (vec == 0) {
                  gate = acc;
                  return;
                }
                if (saved != nullptr) {
                  const std::int64_t pair = plan.pair_of_slot[group.slot + m];
                  T* row = saved + pair * 2 * p.width + panel * 16;
                  store_rest(row, gate, p.width - panel * 16);
                  store_rest(row + p.width, acc, p.width - panel * 16);
                }
                Vec value = mul(silu(gate), acc);
                if (shared) {
                  const std::int64_t token = plan.token_of_slot[group.slot + m];
                  value =
                      mul(value, set1(gammas[token * p.num_shared + group.weight - p.num_experts]));
                }
                store_rounded(h + (group.slot + m) * h_stride + panel * 16, value);
              });
        });
    barrier();
    for_own_panels(plan, panels2, thread, num_threads,
                   [&](const Group& group, std::int64_t begin, std::int64_t end) {
                     const auto* rows = pack_tiles<T>(group.num_rows, p.width, [&](std::int64_t m) {
                       return h + (group.slot + m) * h_stride;
                     });
                     multiply_tiles<kBf16>(
                         w2 + group.weight * panels2 * steps2 * kPanel, steps2, begin, end, rows,
                         group.num_rows, [&](std::int64_t m, std::int64_t panel, int vec, Vec acc) {
                           store(out + (group.slot + m) * out_stride + panel * kPanel + vec * 16,
                                 acc);
                         });
                   });
    barrier();
    const std::int64_t vecs = ceil_div(p.hidden, 16);
    const Range own = split(count * vecs, thread, num_threads);
    for (std::int64_t item = own.begin; item < own.end; ++item) {
      const std::int64_t t = item / vecs, n = item % vecs * 16;
      const std::int32_t* slots = plan.slot_of + t * per_token;
      Vec acc = zero();
      for (std::int32_t j = 0; j < p.top_k; ++j)
        acc = fma(set1(weights[t * p.top_k + j]), load(out + slots[j] * out_stride + n), acc);
      for (std::int64_t j = p.top_k; j < per_token; ++j)
        acc = add(acc, load(out + slots[j] * out_stride + n));
      T* row = y + t * p.y_row_stride + n;
      if (n + 16 <= p.hidden)
        store_rounded(row, acc);
      else
        store_first_rounded(row, acc, static_cast<int>(p.hidden - n));
    }
  });
}

template <class T>
void moe_typed(const MoeParams& p) {
  for (std::int64_t first = 0; first < p.num_tokens; first += kMaxTokens) {
    const std::int64_t count = std::min(kMaxTokens, p.num_tokens - first);
    moe_chunk<T>(p, first, count);
  }
}

}  // namespace

void moe(const MoeParams& p) {
  if (p.dtype == DType::kF32) return TML_F32(moe, moe_typed<float>)(p);
  moe_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
