// moe_bwd: expert after expert in the order of the sum over experts, so that dx is added to in
// place. A run of an expert's tokens: threads pack weights and tokens, then each takes some of the
// tokens (u, d gate, d up, dx), then some of the panels of the weight gradients.
#include "ops/moe_bwd.h"

#include "cpu/arena.h"
#include "cpu/cpu.h"
#include "cpu/panel_cols.h"
#include "cpu/parallel.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

constexpr std::int64_t kPanel = contract::kPanel;
constexpr std::int64_t kBlock = contract::kGradBlock;
// Tokens of an expert between two rounds of barriers: whole blocks, few enough for the caches.
constexpr std::int64_t kRun = 2 * kBlock;
// Tokens a thread carries from u to dx at a time: whole tiles, whole k-steps.
constexpr std::int64_t kRows = 192;
// Below this many multiply-adds a product a second thread costs more than it saves.
constexpr std::int64_t kMinParallelWork = 1 << 18;

struct Slots {
  std::int32_t* token;   // of a slot of the expert-sorted order
  std::int32_t* pair;    // token * (top_k + num_shared) + choice
  std::int32_t* offset;  // [num_experts + num_shared + 1]: first slot of an expert
};

// Counting sort by expert, tokens ascending inside one; shared experts come last with every token.
void sort_slots(const MoeBwdParams& p, const Slots& slots) {
  const std::int64_t per_token = p.top_k + p.num_shared, num_experts = p.num_experts;
  std::int32_t* cursor = slots.offset + 1;  // ends of the experts once every slot is placed
  for (std::int64_t e = 0; e <= num_experts + p.num_shared; ++e) slots.offset[e] = 0;
  for (std::int64_t i = 0; i < p.num_tokens * p.top_k; ++i)
    if (p.expert_ids[i] + 1 < num_experts) cursor[p.expert_ids[i] + 1] += 1;
  for (std::int64_t e = 1; e < num_experts; ++e) cursor[e] += cursor[e - 1];
  for (std::int64_t t = 0; t < p.num_tokens; ++t)
    for (std::int32_t j = 0; j < p.top_k; ++j) {
      const std::int32_t slot = cursor[p.expert_ids[t * p.top_k + j]]++;
      slots.token[slot] = static_cast<std::int32_t>(t);
      slots.pair[slot] = static_cast<std::int32_t>(t * per_token + j);
    }
  for (std::int32_t s = 0; s < p.num_shared; ++s) {
    const std::int64_t first = p.num_tokens * (p.top_k + s);
    for (std::int64_t t = 0; t < p.num_tokens; ++t) {
      slots.token[first + t] = static_cast<std::int32_t>(t);
      slots.pair[first + t] = static_cast<std::int32_t>(t * per_token + p.top_k + s);
    }
    cursor[num_experts + s] = static_cast<std::int32_t>(first + p.num_tokens);
  }
}

template <class T>
struct Backward {
  static constexpr bool kBf16 = sizeof(T) == 2;
  static constexpr std::int64_t kBlockSteps = kBlock / kStepRows<T>;

  const MoeBwdParams& p;
  std::int64_t rows13 = 2 * p.width;
  std::int64_t steps_h = num_k_steps(p.dtype, p.hidden);
  std::int64_t steps13 = num_k_steps(p.dtype, rows13);
  std::int64_t panels_h = ceil_div(p.hidden, kPanel);
  std::int64_t panels_i = ceil_div(p.width, kPanel);
  Slots slots{};
  // Of one expert: W2^T and W13^T, and fp32 sums of blocks.
  KStep *w2t = nullptr, *w13t = nullptr;
  float *sum13 = nullptr, *sum2 = nullptr;
  // Of one run of tokens, k = tokens, block after block: panels of x and s a, tiles of dy and
  // d gate | d up.
  KStep *x_panels = nullptr, *a_panels = nullptr, *dy_tiles = nullptr, *g_tiles = nullptr;

  explicit Backward(const MoeBwdParams& params) : p(params) {
    const std::int64_t experts = p.num_experts + p.num_shared;
    const std::int64_t num_slots = p.num_tokens * (p.top_k + p.num_shared);
    Arena sorted(Scratch::kOp);
    sorted.take(&slots.token, num_slots).take(&slots.pair, num_slots);
    sorted.take(&slots.offset, experts + 1);
    const bool has_wgrad = p.dw13 != nullptr;
    const std::int64_t run_steps = has_wgrad ? kRun / kStepRows<T> : 0;
    const std::int64_t sums = has_wgrad && p.num_tokens > kBlock ? 1 : 0;
    sorted.take(&w2t, panels_i * kPanel * steps_h)
        .take(&w13t, p.dx != nullptr ? panels_h * kPanel * steps13 : 0)
        .take(&x_panels, run_steps * panels_h * kPanel)
        .take(&a_panels, run_steps * panels_i * kPanel)
        .take(&dy_tiles, run_steps * p.hidden)
        .take(&g_tiles, run_steps * rows13)
        .take(&sum13, sums * rows13 * panels_h * kPanel)
        .take(&sum2, sums * p.hidden * panels_i * kPanel)
        .commit();
    sort_slots(p, slots);
  }

  std::int64_t num_slots_of(std::int64_t expert) const {
    return slots.offset[expert + 1] - slots.offset[expert];
  }
  const T* dy_row(std::int64_t slot) const {
    return static_cast<const T*>(p.dy) + slots.token[slot] * p.dy_row_stride;
  }
  const T* x_row(std::int64_t slot) const {
    return static_cast<const T*>(p.x) + slots.token[slot] * p.x_row_stride;
  }

  void pack_weights(std::int64_t expert, int thread, int num_threads) {
    const T* w2 = static_cast<const T*>(p.w2) + expert * p.hidden * p.width;
    pack_column_panels<T>(w2t, steps_h, split(steps_h, thread, num_threads), p.hidden, p.width,
                          [&](std::int64_t row) { return w2 + row * p.width; });
    if (p.dx == nullptr) return;
    const T* w13 = static_cast<const T*>(p.w13) + expert * rows13 * p.hidden;
    pack_column_panels<T>(w13t, steps13, split(steps13, thread, num_threads), rows13, p.hidden,
                          [&](std::int64_t row) { return w13 + row * p.hidden; });
  }

  // x and dy of slots [first, first + count), as the products over tokens read them.
  void pack_tokens(std::int64_t first, std::int64_t count, int thread, int num_threads) {
    for (std::int64_t at = 0; at < count; at += kBlock) {
      const std::int64_t rows = std::min(kBlock, count - at), block = at / kBlock * kBlockSteps;
      const std::int64_t steps = ceil_div(rows, kStepRows<T>);
      const Range own = split(steps, thread, num_threads);
      pack_column_panels<T>(x_panels + block * panels_h * kPanel, steps, own, rows, p.hidden,
                            [&](std::int64_t row) { return x_row(first + at + row); });
      pack_column_tiles<T>(dy_tiles + block * p.hidden, steps, own, rows, p.hidden,
                           [&](std::int64_t row) { return dy_row(first + at + row); });
    }
  }

  struct Local {  // of one thread, for kRows tokens
    KStep *dy, *g;
    T *g_rows, *a_rows;
    float *scale, *lanes;
  };
  Local local() const {
    Local out{};
    Arena arena(Scratch::kThread);
    arena.take(&out.dy, kRows * steps_h)
        .take(&out.g, p.dx != nullptr ? kRows * steps13 : 0)
        .take(&out.g_rows, kRows * rows13)
        .take(&out.a_rows, kRows * p.width)
        .take(&out.scale, kRows)
        .take(&out.lanes, kRows * 16)
        .commit();
    return out;
  }

  template <class RowOf>
  static void pack_row_tiles(KStep* out, std::int64_t count, std::int64_t in_dim,
                             const RowOf& row_of) {
    const std::int64_t num_steps = ceil_div(in_dim, kStepRows<T>);
    const TileSplit tiles(count);
    for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
      const std::int64_t begin = tiles.begin(tile);
      pack_rows<T>(out + begin * num_steps, tiles.rows(tile), in_dim,
                   [&](int m) { return row_of(begin + m); });
    }
  }

  // From u to dx for up to kRows slots of one expert; leaves d gate | d up and s a in `own`.
  void token_grads(std::int64_t expert, std::int64_t first, std::int64_t count, const Local& own) {
    const bool shared = expert >= p.num_experts;
    const std::int64_t per_token = p.top_k + p.num_shared, width = p.width;
    const std::int32_t* pairs = slots.pair + first;
    const std::int32_t* tokens = slots.token + first;
    // Where the scale of slot m lies in weights or gammas, and its gradient beside it.
    const auto scale_at = [&](std::int64_t m) {
      const std::int64_t token = tokens[m], choice = pairs[m] - token * per_token;
      return shared ? token * p.num_shared + choice - p.top_k : token * p.top_k + choice;
    };
    for (std::int64_t m = 0; m < count; ++m) {
      // Rows of an expert lie far apart: ask for them before u is multiplied.
      const T* saved = static_cast<const T*>(p.gate_up) + pairs[m] * rows13;
      for (std::int64_t i = 0; i < rows13; i += 64 / sizeof(T)) prefetch_l2(saved + i);
      own.scale[m] = (shared ? p.gammas : p.weights)[scale_at(m)];
      store(own.lanes + m * 16, zero());
    }
    pack_row_tiles(own.dy, count, p.hidden, [&](std::int64_t m) { return dy_row(first + m); });
    multiply_tiles<kBf16>(
        w2t, steps_h, 0, panels_i, own.dy, count,
        [&](std::int64_t m, std::int64_t panel, int vec, Vec u) {
          const std::int64_t i = panel * kPanel + vec * 16, rest = width - i;
          if (rest <= 0) return;
          if (rest < 16) u = keep_range(u, 0, static_cast<int>(rest), zero());
          const T* saved = static_cast<const T*>(p.gate_up) + pairs[m] * rows13 + i;
          const Vec gate = load_rest(saved, rest), up = load_rest(saved + width, rest);
          const Vec one = set1(1.0f), scale = set1(own.scale[m]);
          const Vec denominator = add(one, exp(sub(zero(), gate)));
          const Vec sig = div(one, denominator), act = div(gate, denominator);
          const Vec a = mul(act, up), du = mul(scale, u);
          float* lanes = own.lanes + m * 16;
          store(lanes, fma(u, shared ? a : round_through<T>(a), load(lanes)));
          T* g = own.g_rows + m * rows13 + i;
          store_rest(g, mul(mul(du, up), fma(act, sub(one, sig), sig)), rest);
          store_rest(g + width, mul(du, act), rest);
          store_rest(own.a_rows + m * width + i, mul(scale, a), rest);
        });
    float* dscale = shared ? p.dgammas : p.dweights;
    for (std::int64_t m = 0; m < count; ++m) dscale[scale_at(m)] = hsum(load(own.lanes + m * 16));
    if (p.dx == nullptr) return;
    pack_row_tiles(own.g, count, rows13, [&](std::int64_t m) { return own.g_rows + m * rows13; });
    multiply_tiles<kBf16>(w13t, steps13, 0, panels_h, own.g, count,
                          [&](std::int64_t m, std::int64_t panel, int vec, Vec acc) {
                            const std::int64_t h = panel * kPanel + vec * 16, rest = p.hidden - h;
                            if (rest <= 0) return;
                            float* sum = p.dx_sum + tokens[m] * p.hidden + h;
                            store_rest(sum, add(load_rest(sum, rest), acc), rest);
                          });
  }

  // Rows [at, at + count) of a run of run_rows, from `own` to the operands of the token products.
  void pack_grads(std::int64_t at, std::int64_t count, std::int64_t run_rows, const Local& own) {
    for (std::int64_t row = at; row < at + count;) {
      const std::int64_t start = row / kBlock * kBlock, end = std::min(start + kBlock, at + count);
      const std::int64_t rows = std::min(kBlock, run_rows - start);
      const std::int64_t steps = ceil_div(rows, kStepRows<T>), block = start / kStepRows<T>;
      const Range range{(row - start) / kStepRows<T>, ceil_div(end - start, kStepRows<T>)};
      pack_column_tiles<T>(g_tiles + block * rows13, steps, range, rows, rows13,
                           [&](std::int64_t r) { return own.g_rows + (start + r - at) * rows13; });
      pack_column_panels<T>(
          a_panels + block * panels_i * kPanel, steps, range, rows, p.width,
          [&](std::int64_t r) { return own.a_rows + (start + r - at) * p.width; });
      row = end;
    }
  }

  // Panels [begin, end) of one weight gradient [num_rows, num_cols] for one block of tokens.
  void add_block(const KStep* panels, const KStep* tiles, std::int64_t steps, Range range,
                 std::int64_t num_rows, std::int64_t num_cols, bool is_first, bool is_last,
                 float* sum, T* out) {
    const std::int64_t sum_stride = ceil_div(num_cols, kPanel) * kPanel;
    multiply_tiles<kBf16>(panels, steps, range.begin, range.end, tiles, num_rows,
                          [&](std::int64_t row, std::int64_t panel, int vec, Vec acc) {
                            const std::int64_t col = panel * kPanel + vec * 16;
                            float* partial = sum + row * sum_stride + col;
                            if (!is_first) acc = add(load(partial), acc);
                            if (!is_last)
                              store(partial, acc);
                            else if (col < num_cols)
                              store_rest(out + row * num_cols + col, acc, num_cols - col);
                          });
  }

  // This thread's panels of both weight gradients, over the blocks of one run.
  void weight_grads(std::int64_t expert, std::int64_t first, std::int64_t count, int thread,
                    int num_threads) {
    T* out13 = static_cast<T*>(p.dw13) + expert * rows13 * p.hidden;
    T* out2 = static_cast<T*>(p.dw2) + expert * p.hidden * p.width;
    const std::int64_t cost13 = panels_h * rows13, cost2 = panels_i * p.hidden;
    const Range own = split(cost13 + cost2, thread, num_threads);
    const auto part = [&](std::int64_t start, std::int64_t num_panels, std::int64_t cost) {
      const auto panel_at = [&](std::int64_t position) {
        return std::min(ceil_div(std::max<std::int64_t>(position - start, 0), cost), num_panels);
      };
      return Range{panel_at(own.begin), panel_at(own.end)};
    };
    const Range own13 = part(0, panels_h, rows13), own2 = part(cost13, panels_i, p.hidden);
    const std::int64_t done = first - slots.offset[expert];
    for (std::int64_t at = 0; at < count; at += kBlock) {
      const std::int64_t steps = ceil_div(std::min(kBlock, count - at), kStepRows<T>);
      const std::int64_t block = at / kBlock * kBlockSteps;
      const bool is_first = done + at == 0, is_last = done + at + kBlock >= num_slots_of(expert);
      add_block(x_panels + block * panels_h * kPanel, g_tiles + block * rows13, steps, own13,
                rows13, p.hidden, is_first, is_last, sum13, out13);
      add_block(a_panels + block * panels_i * kPanel, dy_tiles + block * p.hidden, steps, own2,
                p.hidden, p.width, is_first, is_last, sum2, out2);
    }
  }

  void run() {
    const std::int64_t experts = p.num_experts + p.num_shared;
    const std::int64_t work = p.num_tokens * (p.top_k + p.num_shared) * p.hidden * p.width;
    parallel(work < kMinParallelWork ? 1 : p.num_threads, [&](int thread, int num_threads) {
      const auto barrier = [num_threads] { team_barrier(); };
      const Local own = local();
      const Range own_dx = split(p.num_tokens * p.hidden, thread, num_threads);
      if (p.dx != nullptr)
        for (std::int64_t i = own_dx.begin; i < own_dx.end; ++i) p.dx_sum[i] = 0.0f;
      for (std::int64_t expert = 0; expert < experts; ++expert) {
        const std::int64_t num_slots = num_slots_of(expert);
        if (num_slots == 0) {
          clear_grads(expert, thread, num_threads);
          continue;
        }
        for (std::int64_t done = 0; done < num_slots; done += kRun) {
          const std::int64_t first = slots.offset[expert] + done;
          const std::int64_t count = std::min(kRun, num_slots - done);
          if (done == 0) pack_weights(expert, thread, num_threads);
          if (p.dw13 != nullptr) pack_tokens(first, count, thread, num_threads);
          barrier();
          // Whole k-steps a thread, so that no two write one.
          const Range steps = split(ceil_div(count, 2), thread, num_threads);
          const std::int64_t end = std::min(2 * steps.end, count);
          for (std::int64_t at = 2 * steps.begin; at < end; at += kRows) {
            const std::int64_t rows = std::min(kRows, end - at);
            token_grads(expert, first + at, rows, own);
            if (p.dw13 != nullptr) pack_grads(at, rows, count, own);
          }
          barrier();
          if (p.dw13 != nullptr) weight_grads(expert, first, count, thread, num_threads);
          barrier();
        }
      }
      if (p.dx != nullptr && kBf16) {
        barrier();
        auto* dx = static_cast<T*>(p.dx);
        for (std::int64_t i = own_dx.begin; i < own_dx.end; i += 16)
          store_rest(dx + i, load_rest(p.dx_sum + i, own_dx.end - i), own_dx.end - i);
      }
    });
  }

  void clear_grads(std::int64_t expert, int thread, int num_threads) const {
    if (p.dw13 == nullptr) return;
    const Range own13 = split(rows13 * p.hidden, thread, num_threads);
    const Range own2 = split(p.hidden * p.width, thread, num_threads);
    T* out13 = static_cast<T*>(p.dw13) + expert * rows13 * p.hidden;
    T* out2 = static_cast<T*>(p.dw2) + expert * p.hidden * p.width;
    for (std::int64_t i = own13.begin; i < own13.end; ++i) out13[i] = T{0};
    for (std::int64_t i = own2.begin; i < own2.end; ++i) out2[i] = T{0};
  }
};

template <class T>
void moe_bwd_typed(const MoeBwdParams& p) {
  Backward<T>(p).run();
}

}  // namespace

void moe_bwd(const MoeBwdParams& p) {
  if (p.dtype == DType::kF32) return TML_F32(moe_bwd, moe_bwd_typed<float>)(p);
  moe_bwd_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
