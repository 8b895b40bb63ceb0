// Who does what in attention: tiles of query rows, items (tile, KV head), and one contiguous run of
// (item, segment) per thread, balanced by present pages. An item that a cut falls into is computed
// in pieces, a partial per segment, and folded afterwards; the bits are the same either way.
#pragma once

#include <algorithm>

#include "core/contract.h"
#include "cpu/arena.h"
#include "ops/session_attn.h"

namespace tml::cpu::TML_ISA_NS {

inline constexpr std::int64_t kUnitsPerSegment = contract::kSegmentLen / contract::kPageLen;

// Consecutive tokens of one sequence, and the units any of them sees.
struct AttnTile {
  std::int64_t token, num_tokens;  // in the step
  std::int64_t pos;                // of the first token
  std::int64_t unit_begin, unit_end;
  std::int64_t all_from, all_to;  // keys that every token sees
  const std::int32_t* table;      // unit -> page id, -1 = dropped
  const std::int64_t* present;    // present[unit]: pages of the sequence present before it

  std::int64_t segment_begin() const { return unit_begin / kUnitsPerSegment; }
  std::int64_t segment_end() const { return (unit_end - 1) / kUnitsPerSegment + 1; }
  // Present pages of the tile before a segment.
  std::int64_t pages_before(std::int64_t segment) const {
    const std::int64_t unit = std::clamp(segment * kUnitsPerSegment, unit_begin, unit_end);
    return present[unit] - present[unit_begin];
  }
};

// Cost of a page in rows, beside one for each row: its loads.
inline constexpr std::int64_t kPageCost = 6;
// Rows x pages x head_dim that are worth a thread of their own (about 10 us).
inline constexpr std::int64_t kMinPartCost = 6144;

struct AttnItem {
  std::int32_t tile, kv_head;
};

// Where a thread begins. A cut inside an item names its partials: slot 0 holds the segments before
// `split`, folded; slot 1 + i holds segment split + i.
struct AttnCut {
  std::int64_t item, segment;
  std::int64_t split;  // the item's first cut, or -1 if this cut is between items
  std::int64_t slot;   // of slot 0 among all partials
};

// In the launching thread's scratch, valid until its next plan.
struct AttnPlan {
  AttnPlan(const SessionAttnParams& p, std::int64_t max_rows);

  bool cuts_same_item(int a, int b) const {
    return cuts[a].split >= 0 && cuts[b].split >= 0 && cuts[a].item == cuts[b].item;
  }

  AttnTile* tiles;
  AttnItem* items;
  AttnCut* cuts;    // [num_parts + 1]
  float* partials;  // [num_slots][max_rows * (head_dim + 2)]
  std::int64_t num_items = 0, num_slots = 0;
  int num_parts = 1;

 private:
  void add_tiles(const SessionAttnParams& p, std::int64_t tokens_per_tile);
  void cut(std::int64_t group, int max_parts, std::int64_t head_dim);

  std::int64_t* present_;
};

inline AttnPlan::AttnPlan(const SessionAttnParams& p, std::int64_t max_rows) {
  const std::int64_t group = p.num_heads / p.kv.num_kv_heads;
  const std::int64_t tokens_per_tile = max_rows / group;
  std::int64_t num_tiles = 0, num_units = 0, max_segments = 0;
  for (std::int32_t s = 0; s < p.batch.num_seqs; ++s) {
    const std::int64_t count = p.batch.cu_tokens[s + 1] - p.batch.cu_tokens[s];
    if (count == 0) continue;
    const std::int64_t end = p.batch.start_pos[s] + count;
    num_tiles += ceil_div(count, tokens_per_tile);
    num_units += ceil_div(end, contract::kPageLen) + 1;
    const std::int64_t span = p.window > 0 ? std::min(end, p.window + max_rows) : end;
    max_segments = std::max(max_segments, ceil_div(span, contract::kSegmentLen) + 1);
  }
  const std::int64_t max_slots = (p.num_threads - 1) * (max_segments + 1);
  num_items = num_tiles * p.kv.num_kv_heads;
  Arena(Scratch::kOp)
      .take(&tiles, num_tiles)
      .take(&items, num_items)
      .take(&cuts, p.num_threads + 1)
      .take(&present_, num_units)
      .take(&partials, max_slots * max_rows * (p.kv.head_dim + 2))
      .commit();
  add_tiles(p, tokens_per_tile);
  cut(group, p.num_threads, p.kv.head_dim);
}

inline void AttnPlan::add_tiles(const SessionAttnParams& p, std::int64_t tokens_per_tile) {
  AttnTile* tile = tiles;
  AttnItem* item = items;
  std::int64_t* counts = present_;
  for (std::int32_t s = 0; s < p.batch.num_seqs; ++s) {
    const std::int64_t begin = p.batch.cu_tokens[s];
    const std::int64_t count = p.batch.cu_tokens[s + 1] - begin;
    if (count == 0) continue;
    const std::int32_t* table = p.kv.table + p.batch.slots[s] * p.kv.table_row_stride;
    const std::int64_t start = p.batch.start_pos[s];
    const auto first_key = [&](std::int64_t pos) {
      return p.window > 0 ? std::max<std::int64_t>(0, pos - p.window + 1) : 0;
    };
    const std::int64_t num_tiles = ceil_div(count, tokens_per_tile);
    AttnTile* const first = tile;
    for (std::int64_t t = 0; t < num_tiles; ++t, ++tile) {
      const std::int64_t from = count * t / num_tiles, to = count * (t + 1) / num_tiles;
      std::int64_t first_end = p.batch.visible_end[begin + from], last_end = first_end;
      for (std::int64_t i = begin + from; i < begin + to; ++i) {
        first_end = std::min(first_end, p.batch.visible_end[i]);
        last_end = std::max(last_end, p.batch.visible_end[i]);
      }
      *tile = {begin + from,
               to - from,
               start + from,
               first_key(start + from) / contract::kPageLen,
               last_end / contract::kPageLen + 1,
               first_key(start + to - 1),
               first_end + 1,
               table,
               nullptr};
    }
    // present[unit] counts pages from the sequence's first visible unit on.
    const std::int64_t unit_begin = first->unit_begin;
    const std::int64_t unit_end = (start + count - 1) / contract::kPageLen + 1;
    std::int64_t* const seen = counts;
    *counts++ = 0;
    for (std::int64_t unit = unit_begin; unit < unit_end; ++unit, ++counts)
      *counts = counts[-1] + (table[unit] >= 0 ? 1 : 0);
    for (AttnTile* t = first; t != tile; ++t) t->present = seen - unit_begin;
    for (std::int32_t head = 0; head < p.kv.num_kv_heads; ++head)
      for (AttnTile* t = first; t != tile; ++t)
        *item++ = {static_cast<std::int32_t>(t - tiles), head};
  }
}

inline void AttnPlan::cut(std::int64_t group, int max_parts, std::int64_t head_dim) {
  const auto page_cost = [&](const AttnTile& tile) { return tile.num_tokens * group + kPageCost; };
  const auto cost = [&](std::int64_t i) {
    const AttnTile& tile = tiles[items[i].tile];
    return tile.pages_before(tile.segment_end()) * page_cost(tile) + 1;
  };
  std::int64_t total = 0;
  for (std::int64_t i = 0; i < num_items; ++i) total += cost(i);
  num_parts = static_cast<int>(
      std::clamp<std::int64_t>(total * head_dim / kMinPartCost, 1, std::max(1, max_parts)));
  const auto first_segment = [&](std::int64_t i) {
    return i < num_items ? tiles[items[i].tile].segment_begin() : 0;
  };
  cuts[0] = {0, first_segment(0), -1, 0};
  std::int64_t item = 0, before = 0;
  for (int part = 1; part < num_parts; ++part) {
    const std::int64_t target = total * part / num_parts;
    while (item < num_items && before + cost(item) <= target) before += cost(item++);
    cuts[part] = {item, first_segment(item), -1, 0};
    if (item == num_items) continue;
    // The segment boundary nearest to the target; the last one is the start of the next item.
    const AttnTile& tile = tiles[items[item].tile];
    const std::int64_t wanted = (target - before) / page_cost(tile);
    std::int64_t segment = tile.segment_begin();
    while (segment < tile.segment_end() &&
           wanted - tile.pages_before(segment) > tile.pages_before(segment + 1) - wanted)
      ++segment;
    if (segment == tile.segment_end()) {
      cuts[part] = {item + 1, first_segment(item + 1), -1, 0};
    } else if (segment > tile.segment_begin()) {
      cuts[part] = {item, segment, segment, num_slots};
      if (cuts_same_item(part - 1, part)) {
        cuts[part].split = cuts[part - 1].split;
        cuts[part].slot = cuts[part - 1].slot;
      } else {
        num_slots += 1 + tile.segment_end() - segment;
      }
    }
  }
  cuts[num_parts] = {num_items, 0, -1, 0};
}

}  // namespace tml::cpu::TML_ISA_NS
