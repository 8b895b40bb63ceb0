// attn_prologue and session_attn of the device, run on the host: against the CPU's prologue,
// against softmax in double, and against themselves under any chunking, batch and number of parts.
#include <algorithm>

#include "cpu/cpu.h"
#include "cuda/attn.h"
#include "tests/cuda_kit.h"

namespace tml::tests {
namespace {

constexpr std::int64_t kPage = contract::kPageLen;

// One attention layer and the state of a few sequences.
struct Session {
  std::int32_t heads, kv_heads, dim, d_rel;
  std::int64_t rel_len, window, max_pages;
  std::vector<std::uint16_t> bank, q_norm, k_norm, pages, conv;
  std::vector<float> k_conv, v_conv;
  std::vector<std::int32_t> table;
  std::vector<std::int32_t> table_of_attention;  // if set: pages dropped after the prologue
  float log_floor = 40.0f, log_alpha = 0.3f;
  static constexpr std::int64_t kSlots = 3;

  Session(std::int32_t n, std::int32_t kv, std::int32_t d, std::int64_t rel, std::int64_t w,
          std::int64_t pages_per_slot)
      : heads(n),
        kv_heads(kv),
        dim(d),
        d_rel(16),
        rel_len(rel),
        window(w),
        max_pages(pages_per_slot) {
    const auto width = static_cast<std::size_t>(rel_len + 2 * kRelPad);
    bank.assign(static_cast<std::size_t>(d_rel / 2) * width * 2, 0);
    const auto profile = random_bf16(static_cast<std::size_t>(d_rel * rel_len), 9, 0.3f);
    for (std::int64_t c = 0; c < d_rel; ++c)
      for (std::int64_t distance = 0; distance < rel_len; ++distance)
        bank[(static_cast<std::size_t>(c / 2) * width +
              static_cast<std::size_t>(kRelPad + rel_len - 1 - distance)) *
                 2 +
             static_cast<std::size_t>(c % 2)] =
            profile[static_cast<std::size_t>(c * rel_len + distance)];
    q_norm = random_bf16(static_cast<std::size_t>(dim), 10);
    k_norm = random_bf16(static_cast<std::size_t>(dim), 11);
    const auto channels = static_cast<std::size_t>(kv_heads * dim);
    k_conv = random_f32(channels * 4, 12, 0.3f);
    v_conv = random_f32(channels * 4, 13, 0.3f);
    pages.assign(static_cast<std::size_t>(kSlots * max_pages * page_stride()), kPoison);
    conv = random_bf16(kSlots * 3 * 2 * channels, 14);
    for (std::int32_t page = 0; page < kSlots * max_pages; ++page) table.push_back(page);
    std::reverse(table.begin(), table.end());  // pages are nowhere in order
  }
  std::int64_t page_stride() const { return kv_heads * 2 * kPage * dim; }
  std::int64_t row_width() const { return (heads + 2 * kv_heads) * dim + heads * d_rel; }
  KvPages kv() {
    return {pages.data(), page_stride(), 2 * kPage * dim, table.data(), max_pages, kv_heads, dim};
  }
};

struct Step {
  std::vector<std::int32_t> cu = {0}, slots;
  std::vector<std::int64_t> start, end;
  StepBatch batch() const {
    return {
        cu.data(), slots.data(), start.data(), end.data(), static_cast<std::int32_t>(slots.size()),
        cu.back()};
  }
  // Tokens [from, to) of a slot; with `block`, all see the last.
  void add(std::int32_t slot, std::int64_t from, std::int64_t to, bool block = false) {
    slots.push_back(slot);
    start.push_back(from);
    cu.push_back(cu.back() + static_cast<std::int32_t>(to - from));
    for (std::int64_t i = from; i < to; ++i) end.push_back(block ? to - 1 : i);
  }
};

AttnPrologueParams prologue_of(Session& s, const Step& step, const std::uint16_t* qkvr,
                               std::uint16_t* q, std::uint16_t* r) {
  AttnPrologueParams p{};
  const std::int64_t channels = s.kv_heads * s.dim;
  p.qkvr = qkvr;
  p.k_conv = s.k_conv.data();
  p.v_conv = s.v_conv.data();
  p.q_norm = s.q_norm.data();
  p.k_norm = s.k_norm.data();
  p.q = q;
  p.r = r;
  p.batch = step.batch();
  p.pages = s.kv();
  p.k_rows = {s.conv.data(), 6 * channels, 2 * channels};
  p.v_rows = {s.conv.data() + channels, 6 * channels, 2 * channels};
  p.qkvr_row_stride = s.row_width();
  p.num_heads = s.heads;
  p.d_rel = s.d_rel;
  p.eps = 1e-6f;
  p.log_floor = s.log_floor;
  p.log_alpha = s.log_alpha;
  p.dtype = DType::kBf16;
  p.num_threads = 1;
  return p;
}

struct Output {
  std::vector<std::uint16_t> q, r, o;
  std::vector<float> lse;
};

// qkvr [tokens of the step] through prologue and attention; num_parts 0: the launcher's choice.
Output attend(Session& s, const Step& step, const std::vector<std::uint16_t>& qkvr,
              int num_parts = 0) {
  const std::int64_t tokens = step.cu.back();
  Output out;
  out.q.assign(static_cast<std::size_t>(tokens * s.heads * s.dim), kPoison);
  out.r.assign(static_cast<std::size_t>(tokens * s.heads * s.d_rel), kPoison);
  out.o = out.q;
  out.lse.assign(static_cast<std::size_t>(tokens * s.heads), -1.0f);
  cuda::attn_prologue(prologue_of(s, step, qkvr.data(), out.q.data(), out.r.data()), host_launch());
  SessionAttnParams p{};
  p.q = out.q.data();
  p.r = out.r.data();
  p.rel_bank = s.bank.data();
  p.out = out.o.data();
  p.lse = out.lse.data();
  p.kv = s.kv();
  if (!s.table_of_attention.empty()) p.kv.table = s.table_of_attention.data();
  p.batch = step.batch();
  p.window = s.window;
  p.rel_len = s.rel_len;
  p.rel_dim = s.d_rel;
  p.num_heads = s.heads;
  p.scale = 1.0f / static_cast<float>(s.dim);
  p.dtype = DType::kBf16;
  std::size_t needed;
  cuda::attn_plan(p, 3, num_parts, nullptr, &needed);
  std::vector<float> workspace(needed / 4 + 64, __builtin_nanf(""));
  const auto base = (reinterpret_cast<std::uintptr_t>(workspace.data()) + 255) / 256 * 256;
  auto* const memory = reinterpret_cast<void*>(base);
  if (num_parts == 0) {
    cuda::session_attn(p, host_launch(memory, needed));
    return out;
  }
  const cuda::AttnParams params = cuda::attn_plan(p, 3, num_parts, memory, &needed);
  if (s.dim == 64)
    cuda::session_attn_sized<64>(params, host_launch());
  else
    cuda::session_attn_sized<128>(params, host_launch());
  return out;
}

float page_value(const Session& s, std::int32_t slot, std::int64_t key, std::int64_t head,
                 std::int64_t channel, bool is_v) {
  const std::int32_t page = s.table[static_cast<std::size_t>(slot * s.max_pages + key / kPage)];
  const std::int64_t at = page * s.page_stride() + head * 2 * kPage * s.dim +
                          (is_v ? kPage * s.dim : 0) +
                          cuda::page_offset(key % kPage, channel, s.dim);
  return to_float(s.pages[static_cast<std::size_t>(at)]);
}

// Softmax in double over what the token sees.
void check_reference(const Session& s, const Step& step, const Output& out) {
  const std::int64_t width = s.rel_len + 2 * kRelPad;
  for (std::size_t b = 0; b < step.slots.size(); ++b)
    for (std::int64_t t = step.cu[b]; t < step.cu[b + 1]; ++t)
      for (std::int64_t h = 0; h < s.heads; ++h) {
        const std::int64_t pos = step.start[b] + t - step.cu[b];
        const std::int64_t kv = h / (s.heads / s.kv_heads), row = t * s.heads + h;
        std::vector<double> scores;
        std::vector<std::int64_t> keys;
        for (std::int64_t k = 0; k <= step.end[static_cast<std::size_t>(t)]; ++k) {
          if (s.window > 0 && pos - k >= s.window) continue;
          if (s.table[static_cast<std::size_t>(step.slots[b] * s.max_pages + k / kPage)] < 0)
            continue;
          double score = 0.0;
          for (std::int64_t d = 0; d < s.dim; ++d)
            score +=
                static_cast<double>(to_float(out.q[static_cast<std::size_t>(row * s.dim + d)])) *
                page_value(s, step.slots[b], k, kv, d, false);
          score *= static_cast<double>(1.0f / static_cast<float>(s.dim));
          if (pos - k >= 0 && pos - k < s.rel_len)
            for (std::int64_t c = 0; c < s.d_rel; ++c)
              score += static_cast<double>(
                           to_float(out.r[static_cast<std::size_t>(row * s.d_rel + c)])) *
                       to_float(s.bank[static_cast<std::size_t>(
                           (c / 2 * width + kRelPad + s.rel_len - 1 - (pos - k)) * 2 + c % 2)]);
          scores.push_back(score);
          keys.push_back(k);
        }
        double top = -1e30, sum = 0.0;
        for (const double x : scores) top = std::max(top, x);
        for (const double x : scores) sum += std::exp(x - top);
        const float lse = out.lse[static_cast<std::size_t>(row)];
        if (keys.empty()) {
          TML_CHECK_EQUAL(lse, -__builtin_inff());
          for (std::int64_t d = 0; d < s.dim; ++d)
            TML_CHECK_EQUAL(out.o[static_cast<std::size_t>(row * s.dim + d)], 0);
          continue;
        }
        TML_CHECK_NEAR(lse, top + std::log(sum), 1e-4);
        for (std::int64_t d = 0; d < s.dim; d += 7) {
          double value = 0.0;
          for (std::size_t i = 0; i < keys.size(); ++i)
            value += std::exp(scores[i] - top) / sum *
                     page_value(s, step.slots[b], keys[i], kv, d, true);
          // Rounding of p and of o, each half a unit of eight bits, to values of a few.
          TML_CHECK_NEAR(to_float(out.o[static_cast<std::size_t>(row * s.dim + d)]), value, 0.02);
        }
      }
}

std::vector<std::uint16_t> rows_of(const std::vector<std::uint16_t>& all, std::int64_t width,
                                   std::int64_t from, std::int64_t to) {
  return {all.begin() + from * width, all.begin() + to * width};
}

TML_TEST(cuda_attn_prologue_is_the_op) {
  for (const std::int32_t dim : {64, 128, 16}) {
    Session ours(4, 2, dim, 24, 0, 3), theirs = ours;
    Step step;
    step.add(2, 126, 135);
    step.add(0, 5, 6);
    step.add(1, 0, 2);
    const auto qkvr = random_bf16(static_cast<std::size_t>(12 * ours.row_width()), 1);
    std::vector<std::uint16_t> q(12 * 4 * static_cast<std::size_t>(dim)), r(12 * 4 * 16), q2 = q,
                                                                                          r2 = r;
    cuda::attn_prologue(prologue_of(ours, step, qkvr.data(), q.data(), r.data()), host_launch());
    cpu::attn_prologue(prologue_of(theirs, step, qkvr.data(), q2.data(), r2.data()));
    TML_CHECK(r == r2);
    TML_CHECK(ours.conv == theirs.conv);
    for (std::size_t i = 0; i < q.size(); ++i)
      TML_CHECK_NEAR(to_float(q[i]), to_float(q2[i]), 0x1p-6 * std::fabs(to_float(q2[i])));
    for (std::size_t b = 0; b < 3; ++b)
      for (std::int64_t t = step.start[b]; t < step.start[b] + step.cu[b + 1] - step.cu[b]; ++t)
        for (std::int64_t h = 0; h < 2; ++h)
          for (std::int64_t d = 0; d < dim; ++d) {
            const std::int32_t slot = step.slots[b];
            const std::int64_t key = t % kPage;
            const auto block = static_cast<std::int64_t>(
                theirs.table[static_cast<std::size_t>(slot * 3 + t / kPage)] *
                    theirs.page_stride() +
                h * 2 * kPage * dim);
            const float k = to_float(
                theirs.pages[static_cast<std::size_t>(block + (d / 2 * kPage + key) * 2 + d % 2)]);
            const float v = to_float(theirs.pages[static_cast<std::size_t>(
                block + kPage * dim + (key / 2 * dim + d) * 2 + key % 2)]);
            TML_CHECK_NEAR(page_value(ours, slot, t, h, d, false), k, 0x1p-6 * std::fabs(k));
            TML_CHECK_EQUAL(page_value(ours, slot, t, h, d, true), v);
          }
  }
}

// 150 tokens at once, and in chunks that another sequence shares: the same bits.
void check_chunks(Session whole_session, bool has_block) {
  constexpr std::int64_t kTokens = 150;
  Session chunked = whole_session;
  const auto qkvr = random_bf16(static_cast<std::size_t>(kTokens * whole_session.row_width()), 2);
  const auto other = random_bf16(static_cast<std::size_t>(kTokens * whole_session.row_width()), 3);
  // A bidirectional block is appended whole: [120, 139).
  const std::vector<std::int64_t> cuts = {0, 1, 3, 60, 120, 139, 140, kTokens};
  Step all;
  all.add(1, 0, kTokens);
  if (has_block)
    for (std::int64_t t = 120; t < 139; ++t) all.end[static_cast<std::size_t>(t)] = 138;
  const Output whole = attend(whole_session, all, qkvr);
  check_reference(whole_session, all, whole);
  for (std::size_t c = 0; c + 1 < cuts.size(); ++c) {
    const std::int64_t from = cuts[c], to = cuts[c + 1];
    Step step;
    step.add(0, from / 2, to / 2);
    step.add(1, from, to, has_block && from == 120);
    auto rows = rows_of(other, chunked.row_width(), from / 2, to / 2);
    const auto ours = rows_of(qkvr, chunked.row_width(), from, to);
    rows.insert(rows.end(), ours.begin(), ours.end());
    const Output part = attend(chunked, step, rows);
    const std::int64_t skip = to / 2 - from / 2, width = chunked.heads * chunked.dim;
    TML_CHECK(
        std::equal(part.o.begin() + skip * width, part.o.end(), whole.o.begin() + from * width));
    TML_CHECK(std::equal(part.lse.begin() + skip * chunked.heads, part.lse.end(),
                         whole.lse.begin() + from * chunked.heads));
  }
}

TML_TEST(cuda_session_attn_is_the_op_in_any_chunks) {
  check_chunks(Session(4, 2, 64, 40, 0, 2), true);
  check_chunks(Session(2, 1, 64, 200, 37, 2), false);
  check_chunks(Session(8, 1, 128, 16, 0, 2), false);
}

TML_TEST(cuda_session_attn_parts_do_not_show) {
  // 36 pages are three segments; some pages are dropped, a whole segment's among them.
  Session s(4, 2, 64, 40, 0, 37);
  Random random(4);
  for (std::uint16_t& x : s.pages) x = to_bf16(random.normal());
  Step step;
  step.add(1, 36 * kPage - 5, 36 * kPage + 2);
  const auto qkvr = random_bf16(static_cast<std::size_t>(7 * s.row_width()), 5);
  for (std::int64_t page = 3; page < 10; ++page)
    s.table[static_cast<std::size_t>(s.max_pages + page)] = -1;
  Session one = s, two = s, three = s;
  const Output a = attend(one, step, qkvr, 1), b = attend(two, step, qkvr, 2);
  const Output c = attend(three, step, qkvr, 3);
  check_reference(one, step, a);
  TML_CHECK(a.o == b.o && a.lse == b.lse);
  TML_CHECK(a.o == c.o && a.lse == c.lse);
  for (std::int64_t page = 16; page < 32; ++page)
    s.table[static_cast<std::size_t>(s.max_pages + page)] = -1;
  Session four = s, five = s;
  const Output d = attend(four, step, qkvr, 1), e = attend(five, step, qkvr, 3);
  check_reference(four, step, d);
  TML_CHECK(d.o == e.o && d.lse == e.lse);
}

TML_TEST(cuda_session_attn_row_that_sees_nothing) {
  Session s(2, 1, 64, 8, 130, 3);
  Step step;
  step.add(0, 300, 302);
  const auto qkvr = random_bf16(static_cast<std::size_t>(2 * s.row_width()), 6);
  s.table_of_attention.assign(s.table.size(), -1);
  const Output out = attend(s, step, qkvr);
  for (const float lse : out.lse) TML_CHECK_EQUAL(lse, -__builtin_inff());
  for (const std::uint16_t o : out.o) TML_CHECK_EQUAL(o, 0);
}

TML_TEST(cuda_attn_tiles_cover_every_token_once) {
  const std::vector<std::int32_t> cu = {0, 0, 5, 5, 69, 70};
  const std::vector<std::int64_t> start(5, 100);
  const StepBatch batch{cu.data(), nullptr, start.data(), nullptr, 5, 70};
  for (const std::int32_t width : {1, 4, 16, 64}) {
    std::vector<int> seen(70, 0);
    for (std::int32_t id = 0; id < cuda::num_attn_tiles(70, 5, width); ++id) {
      const cuda::AttnTile tile = cuda::attn_tile(batch, width, id);
      for (std::int32_t i = 0; i < tile.num_tokens; ++i)
        ++seen[static_cast<std::size_t>(tile.token + i)];
      if (tile.num_tokens > 0)
        TML_CHECK_EQUAL(tile.pos, 100 + tile.token - cu[static_cast<std::size_t>(tile.seq)]);
    }
    TML_CHECK(seen == std::vector<int>(70, 1));
  }
}

}  // namespace
}  // namespace tml::tests
