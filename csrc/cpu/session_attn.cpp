// session_attn: a thread owns a run of (query rows x KV head, segment) and walks its pages once.
// The rows of a KV head's group, up to 64, share each page: K and V stream through the L2 cache,
// the next block being requested while this one is multiplied.
#include "ops/session_attn.h"

#include "cpu/attn_plan.h"
#include "cpu/attn_unit.h"
#include "cpu/cpu.h"
#include "cpu/parallel.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

template <class T>
class AttnWorker {
 public:
  AttnWorker(const SessionAttnParams& p, const AttnPlan& plan)
      : p_(p),
        plan_(plan),
        head_dim_(p.kv.head_dim),
        group_(p.num_heads / p.kv.num_kv_heads),
        q_steps_(num_k_steps(p.dtype, head_dim_)),
        rel_steps_(num_k_steps(p.dtype, p.rel_dim)) {
    Arena(Scratch::kThread)
        .take(&q_, kMaxRows * kRowSteps)
        .take(&r_, kMaxRows * kRowSteps)
        .take(&s_, kMaxRows * kRowSteps)
        .take(&probs_, kMaxRows * kRowSteps)
        .take(&unit_.m, kMaxRows)
        .take(&unit_.l, kMaxRows)
        .take(&segment_.m, kMaxRows)
        .take(&segment_.l, kMaxRows)
        .take(&segment_.o, kMaxRows * head_dim_)
        .take(&total_.m, kMaxRows)
        .take(&total_.l, kMaxRows)
        .take(&total_.o, kMaxRows * head_dim_)
        .commit();
    for (int row = 0; row < kMaxRows; ++row)
      token_of_row_[row] = static_cast<std::int32_t>(row / group_);
  }

  // The part-th run of the plan. Items that lie wholly inside it are written, others saved.
  void run(int part) {
    const AttnCut& begin = plan_.cuts[part];
    const AttnCut& end = plan_.cuts[part + 1];
    for (std::int64_t i = begin.item; i < plan_.num_items && i <= end.item; ++i) {
      const bool starts_inside = i == begin.item && begin.split >= 0;
      const bool ends_inside = i == end.item;
      if (ends_inside && end.split < 0) break;
      open(plan_.items[i]);
      std::int64_t segment = starts_inside ? begin.segment : tile_->segment_begin();
      const std::int64_t last = ends_inside ? end.segment : tile_->segment_end();
      if (starts_inside) {
        for (; segment < last; ++segment) {
          walk_segment(segment);
          save(segment_, partial(begin.slot + 1 + segment - begin.split));
        }
        continue;
      }
      walk_segment(segment);
      std::swap(segment_, total_);  // the first operand of a fold is copied
      while (++segment < last) {
        walk_segment(segment);
        fold(total_, segment_, num_rows_, head_dim_);
      }
      if (ends_inside)
        save(total_, partial(end.slot));
      else
        write(total_);
    }
  }

  // Folds the pieces of the items that a cut fell into; each part takes its share of them.
  void join(int part) {
    for (int c = 1, found = 0; c < plan_.num_parts; ++c) {
      const AttnCut& cut = plan_.cuts[c];
      if (cut.split < 0 || plan_.cuts_same_item(c - 1, c)) continue;
      if (found++ % plan_.num_parts != part) continue;
      open(plan_.items[cut.item]);
      const Partial total = partial(cut.slot);
      for (std::int64_t segment = cut.split; segment < tile_->segment_end(); ++segment)
        fold(total, partial(cut.slot + 1 + segment - cut.split), num_rows_, head_dim_);
      write(total);
    }
  }

 private:
  Partial partial(std::int64_t slot) const {
    float* base = plan_.partials + slot * kMaxRows * (head_dim_ + 2);
    return {base, base + kMaxRows, base + 2 * kMaxRows};
  }

  void save(const Partial& from, const Partial& to) const {
    std::memcpy(to.m, from.m, kMaxRows * sizeof(float));
    std::memcpy(to.l, from.l, kMaxRows * sizeof(float));
    std::memcpy(to.o, from.o, static_cast<std::size_t>(num_rows_ * head_dim_) * sizeof(float));
  }

  // Row token * group + g of a tile is head g of the item's group: its row in q, r and out.
  std::int64_t head_row(int row) const {
    return (tile_->token + token_of_row_[row]) * p_.num_heads + item_->kv_head * group_ + row -
           token_of_row_[row] * group_;
  }

  void open(const AttnItem& item) {
    item_ = &item;
    tile_ = plan_.tiles + item.tile;
    num_rows_ = static_cast<int>(tile_->num_tokens * group_);
    const auto* q = static_cast<const T*>(p_.q);
    const auto* r = static_cast<const T*>(p_.r);
    for (int row = 0; row < num_rows_; ++row) {
      const std::int64_t source = head_row(row);
      KStep* r_row = r_ + row * kRowSteps;
      std::memcpy(q_ + row * kRowSteps, q + source * head_dim_,
                  static_cast<std::size_t>(head_dim_) * sizeof(T));
      r_row[rel_steps_ - 1] = 0;  // where an odd number of bf16 ends
      std::memcpy(r_row, r + source * p_.rel_dim, static_cast<std::size_t>(p_.rel_dim) * sizeof(T));
    }
  }

  const KStep* k_block(const AttnTile& tile, std::int64_t unit, std::int64_t kv_head) const {
    return reinterpret_cast<const KStep*>(static_cast<const T*>(p_.kv.pages) +
                                          tile.table[unit] * p_.kv.page_stride +
                                          kv_head * p_.kv.head_stride);
  }

  // The keys read after this unit's: of the tile's next page, else of the next item; or null.
  const KStep* next_k_block(std::int64_t unit) const {
    for (++unit; unit < tile_->unit_end; ++unit)
      if (tile_->table[unit] >= 0) return k_block(*tile_, unit, item_->kv_head);
    const AttnItem* item = item_ + 1;
    if (item == plan_.items + plan_.num_items) return nullptr;
    const AttnTile& tile = plan_.tiles[item->tile];
    for (unit = tile.unit_begin; unit < tile.unit_end; ++unit)
      if (tile.table[unit] >= 0) return k_block(tile, unit, item->kv_head);
    return nullptr;
  }

  // segment_ = left fold of the units of one segment.
  void walk_segment(std::int64_t segment) {
    const std::int64_t begin = std::max(tile_->unit_begin, segment * kUnitsPerSegment);
    const std::int64_t end = std::min(tile_->unit_end, (segment + 1) * kUnitsPerSegment);
    clear(segment_, num_rows_, head_dim_);
    for (std::int64_t unit = begin; unit < end; ++unit)
      if (tile_->table[unit] >= 0) walk_unit(unit);
  }

  // segment_ = fold(segment_, unit).
  void walk_unit(std::int64_t unit) {
    Visible visible;
    int first = 0, last = kUnit;
    const std::int64_t base = unit * kUnit;
    const bool is_full = tile_->all_from <= base && base + kUnit <= tile_->all_to;
    if (!is_full && !find_visible(base, visible, first, last)) return;
    // Vectors of keys that some row sees, in pairs; the others are masked whatever they hold.
    const int vec = first / 32 * 2;
    const int num_vecs = (last + 31) / 32 * 2 - vec;
    const std::int64_t block_bytes = kUnit * head_dim_ * static_cast<std::int64_t>(sizeof(T));
    const KStep* k = k_block(*tile_, unit, item_->kv_head);
    const KStep* v = k + q_steps_ * kUnit;
    const KStep* next = next_k_block(unit);
    const bool has_bias = load_bias(unit, vec, num_vecs);
    score_rows<T>(s_ + vec * 16, k + vec * 16, num_vecs, q_, num_rows_, q_steps_, p_.scale,
                  has_bias, {v, next, block_bytes});
    softmax_rows<T>(s_, probs_, num_rows_, is_full ? nullptr : &visible, unit_.m, unit_.l);
    alignas(64) float weight_o[kMaxRows], weight_u[kMaxRows];
    fold_sums(segment_, unit_, num_rows_, weight_o, weight_u);
    const std::int64_t step = num_k_steps(p_.dtype, vec * 16);
    const std::int64_t num_steps = num_k_steps(p_.dtype, last) - step;
    weigh_values<T>(segment_.o, v + step * head_dim_, head_dim_, probs_ + step, num_rows_,
                    num_steps, weight_o, weight_u,
                    {next, next == nullptr ? nullptr : next + q_steps_ * kUnit, block_bytes});
  }

  // What each row sees of the unit, and the span of keys that any row sees; false: none.
  bool find_visible(std::int64_t base, Visible& visible, int& first, int& last) const {
    first = kUnit;
    last = 0;
    for (std::int64_t t = 0; t < tile_->num_tokens; ++t) {
      const std::int64_t begin = p_.window > 0 ? tile_->pos + t - p_.window + 1 - base : 0;
      const std::int64_t end = p_.batch.visible_end[tile_->token + t] + 1 - base;
      const int from = static_cast<int>(std::clamp<std::int64_t>(begin, 0, kUnit));
      const int to = static_cast<int>(std::clamp<std::int64_t>(end, 0, kUnit));
      for (std::int64_t g = 0; g < group_; ++g) {
        visible.first[t * group_ + g] = from;
        visible.last[t * group_ + g] = to;
      }
      if (from >= to) continue;
      first = std::min(first, from);
      last = std::max(last, to);
    }
    return first < last;
  }

  // s_ = r . P at the distances of a unit, 0 for tokens that are rel_len or more from all of it;
  // false: 0 for every token, and nothing is written. The heads of a token share their weights.
  bool load_bias(std::int64_t unit, int vec, int num_vecs) {
    const std::int64_t distance = tile_->pos - unit * kUnit;  // of the first token to the first key
    const std::int64_t end = p_.rel_len + kUnit - 1;
    if (distance + tile_->num_tokens <= 0 || distance >= end) return false;
    const auto* bank = static_cast<const KStep*>(p_.rel_bank) + kRelPad + p_.rel_len - 1 + vec * 16;
    for (std::int64_t t = 0; t < tile_->num_tokens; ++t) {
      float* s = s_ + t * group_ * kRowSteps + vec * 16;
      if (distance + t >= 0 && distance + t < end)
        multiply_rows<sizeof(T) == 2, false>(
            bank - distance - t, p_.rel_len + 2 * kRelPad, num_vecs, r_ + t * group_ * kRowSteps,
            static_cast<int>(group_), rel_steps_, {},
            [&](int m, int v, Vec acc) TML_LAMBDA { store(s + m * kRowSteps + v * 16, acc); });
      else
        for (std::int64_t row = 0; row < group_; ++row)
          for (int v = 0; v < num_vecs; ++v) store(s + row * kRowSteps + v * 16, zero());
    }
    return true;
  }

  void write(const Partial& total) const {
    auto* out = static_cast<T*>(p_.out);
    for (int row = 0; row < num_rows_; ++row) {
      const std::int64_t target = head_row(row);
      const float sum = total.l[row];
      const bool is_empty = total.m[row] == kMasked && sum == 0.0f;
      for (std::int64_t d = 0; d < head_dim_; d += 16) {
        const Vec o = div(load(total.o + row * head_dim_ + d), set1(is_empty ? 1.0f : sum));
        store_rounded(out + target * head_dim_ + d, add(o, zero()));
      }
      if (p_.lse != nullptr)
        p_.lse[target] = is_empty ? -__builtin_inff() : total.m[row] + log1(sum);
    }
  }

  const SessionAttnParams& p_;
  const AttnPlan& plan_;
  const std::int64_t head_dim_, group_, q_steps_, rel_steps_;
  KStep *q_, *r_, *probs_;
  float* s_;
  std::int32_t token_of_row_[kMaxRows];
  Partial unit_{}, segment_{}, total_{};
  const AttnItem* item_ = nullptr;
  const AttnTile* tile_ = nullptr;
  int num_rows_ = 0;
};

template <class T>
void session_attn_typed(const SessionAttnParams& p) {
  const AttnPlan plan(p, kMaxRows);
  parallel(plan.num_parts, [&](int thread, int num_threads) {
    AttnWorker<T> worker(p, plan);
    // A region may get fewer threads than it asked for.
    for (int part = thread; part < plan.num_parts; part += num_threads) worker.run(part);
    if (plan.num_slots == 0) return;
    team_barrier();
    for (int part = thread; part < plan.num_parts; part += num_threads) worker.join(part);
  });
}

}  // namespace

void session_attn(const SessionAttnParams& p) {
  if (p.batch.num_tokens == 0) return;
  if (p.dtype == DType::kF32) return TML_F32(session_attn, session_attn_typed<float>)(p);
  session_attn_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
