#include "bindings/step_batch.h"

#include <algorithm>
#include <vector>

#include "core/contract.h"

namespace tml {
namespace {

constexpr std::int64_t kPageLen = contract::kPageLen;
// Positions stay far from overflow, whatever is added to them.
constexpr std::int64_t kMaxPosition = std::int64_t{1} << 62;

std::string at(const char* op, const char* name, std::int64_t index) {
  return std::string(op) + ": " + name + "[" + std::to_string(index) + "]";
}

std::string range_text(std::int64_t begin, std::int64_t end) {
  return "in [" + std::to_string(begin) + ", " + std::to_string(end) + ")";
}

[[noreturn]] void refuse(const std::string& what, const std::string& expected, std::int64_t got) {
  throw ArgumentError(what + " must be " + expected + ", got " + std::to_string(got));
}

void check_cu_tokens(const char* op, const StepBatch& batch) {
  if (batch.cu_tokens[0] != 0) refuse(at(op, "cu_tokens", 0), "0", batch.cu_tokens[0]);
  for (std::int64_t s = 0; s < batch.num_seqs; ++s)
    if (batch.cu_tokens[s + 1] < batch.cu_tokens[s])
      refuse(at(op, "cu_tokens", s + 1),
             "at least " + std::to_string(batch.cu_tokens[s]) + " (the entry before)",
             batch.cu_tokens[s + 1]);
  if (batch.cu_tokens[batch.num_seqs] != batch.num_tokens)
    refuse(at(op, "cu_tokens", batch.num_seqs),
           std::to_string(batch.num_tokens) + " (the number of tokens)",
           batch.cu_tokens[batch.num_seqs]);
}

void check_slots(const char* op, const StepBatch& batch, std::int64_t num_slots) {
  // A stamp per slot finds a repeated one in one pass, without clearing anything between calls.
  thread_local std::vector<std::uint64_t> stamps;
  thread_local std::uint64_t stamp = 0;
  if (stamps.size() < static_cast<std::size_t>(num_slots))
    stamps.resize(static_cast<std::size_t>(num_slots), 0);
  ++stamp;
  for (std::int64_t s = 0; s < batch.num_seqs; ++s) {
    const std::int64_t slot = batch.slots[s];
    if (slot < 0 || slot >= num_slots) refuse(at(op, "slots", s), range_text(0, num_slots), slot);
    std::uint64_t& seen = stamps[static_cast<std::size_t>(slot)];
    if (seen == stamp) refuse(at(op, "slots", s), "distinct within a step", slot);
    seen = stamp;
  }
}

void check_visible_end(const char* op, const StepBatch& batch) {
  for (std::int64_t s = 0; s < batch.num_seqs; ++s) {
    const std::int64_t begin = batch.cu_tokens[s];
    const std::int64_t count = batch.cu_tokens[s + 1] - begin;
    const std::int64_t end = batch.start_pos[s] + count;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t visible = batch.visible_end[begin + i];
      if (visible < batch.start_pos[s] + i || visible >= end)
        refuse(at(op, "visible_end", begin + i), range_text(batch.start_pos[s] + i, end), visible);
    }
  }
}

// Table entries of positions [begin, end) of one slot lie in [lowest, num_pages).
void check_entries(const char* op, const KvPages& pages, std::int64_t slot, std::int64_t begin,
                   std::int64_t end, std::int64_t lowest, std::int64_t num_pages) {
  if (end > pages.table_row_stride * kPageLen)
    throw ArgumentError(std::string(op) + ": table has room for " +
                        std::to_string(pages.table_row_stride * kPageLen) + " positions, slot " +
                        std::to_string(slot) + " needs " + std::to_string(end));
  const std::int32_t* row = pages.table + slot * pages.table_row_stride;
  for (std::int64_t page = begin / kPageLen; page * kPageLen < end; ++page)
    if (row[page] < lowest || row[page] >= num_pages)
      refuse(
          std::string(op) + ": table[" + std::to_string(slot) + ", " + std::to_string(page) + "]",
          "a page id " + range_text(lowest, num_pages), row[page]);
}

}  // namespace

StepBatch batch_arg(const char* op, nb::handle cu_tokens_h, nb::handle slots_h,
                    nb::handle start_pos_h, nb::handle visible_end_h, std::int64_t num_tokens,
                    std::int64_t num_slots) {
  const Tensor slots(slots_h, op, "slots");
  slots.dtype(DType::kI32).rank(1).contiguous();
  const std::int64_t num_seqs = slots.size(0);
  const Tensor cu_tokens(cu_tokens_h, op, "cu_tokens");
  cu_tokens.dtype(DType::kI32).shape({num_seqs + 1}).contiguous();
  StepBatch batch{};
  batch.cu_tokens = cu_tokens.data<const std::int32_t>();
  batch.slots = slots.data<const std::int32_t>();
  batch.num_seqs = static_cast<std::int32_t>(num_seqs);
  batch.num_tokens = num_tokens;
  check_cu_tokens(op, batch);
  check_slots(op, batch, num_slots);
  if (!start_pos_h.is_none()) {
    const Tensor start_pos(start_pos_h, op, "start_pos");
    start_pos.dtype(DType::kI64).shape({num_seqs}).contiguous();
    batch.start_pos = start_pos.data<const std::int64_t>();
    for (std::int64_t s = 0; s < num_seqs; ++s)
      if (batch.start_pos[s] < 0 || batch.start_pos[s] >= kMaxPosition)
        refuse(at(op, "start_pos", s), range_text(0, kMaxPosition), batch.start_pos[s]);
  }
  if (!visible_end_h.is_none()) {
    const Tensor visible_end(visible_end_h, op, "visible_end");
    visible_end.dtype(DType::kI64).shape({num_tokens}).contiguous();
    if (start_pos_h.is_none())
      throw ArgumentError(std::string(op) + ": visible_end needs start_pos, got None");
    batch.visible_end = visible_end.data<const std::int64_t>();
    check_visible_end(op, batch);
  }
  return batch;
}

StepBatch packed_arg(const char* op, nb::handle cu_tokens_h, std::int64_t num_tokens) {
  const Tensor cu_tokens(cu_tokens_h, op, "cu_tokens");
  cu_tokens.dtype(DType::kI32).rank(1).contiguous();
  if (cu_tokens.size(0) == 0) cu_tokens.refuse("[num_seqs + 1]", "an empty tensor");
  StepBatch batch{};
  batch.cu_tokens = cu_tokens.data<const std::int32_t>();
  batch.num_seqs = static_cast<std::int32_t>(cu_tokens.size(0) - 1);
  batch.num_tokens = num_tokens;
  check_cu_tokens(op, batch);
  return batch;
}

KvPages pages_arg(const char* op, const Tensor& pages, std::int64_t layer, const Tensor& table,
                  DType dtype) {
  pages.dtype(dtype).shape({kAny, kAny, kAny, 2, kAny}).contiguous().aligned(64);
  table.dtype(DType::kI32).rank(2).contiguous();
  if (pages.size(4) == 0 || pages.size(4) % kPageLen != 0)
    pages.refuse("[..., 2, 128 * head_dim]", std::to_string(pages.size(4)) + " wide");
  if (layer < 0 || layer >= pages.size(1))
    refuse(std::string(op) + ": layer", range_text(0, pages.size(1)) + " (layers of pages)", layer);
  const std::int64_t head_stride = 2 * pages.size(4);
  const std::int64_t layer_stride = pages.size(2) * head_stride;
  KvPages out{};
  out.pages = pages.data<char>() + layer * layer_stride * static_cast<std::int64_t>(size_of(dtype));
  out.page_stride = pages.size(1) * layer_stride;
  out.head_stride = head_stride;
  out.table = table.data<const std::int32_t>();
  out.table_row_stride = table.size(1);
  out.num_kv_heads = static_cast<std::int32_t>(pages.size(2));
  out.head_dim = static_cast<std::int32_t>(pages.size(4) / kPageLen);
  return out;
}

void check_written_pages(const char* op, const StepBatch& batch, const KvPages& pages,
                         std::int64_t num_pages) {
  for (std::int64_t s = 0; s < batch.num_seqs; ++s) {
    const std::int64_t count = batch.cu_tokens[s + 1] - batch.cu_tokens[s];
    const std::int64_t begin = batch.start_pos[s];
    if (count > 0) check_entries(op, pages, batch.slots[s], begin, begin + count, 0, num_pages);
  }
}

void check_visible_pages(const char* op, const StepBatch& batch, const KvPages& pages,
                         std::int64_t num_pages, std::int64_t window) {
  for (std::int64_t s = 0; s < batch.num_seqs; ++s) {
    const std::int64_t count = batch.cu_tokens[s + 1] - batch.cu_tokens[s];
    const std::int64_t begin =
        window > 0 ? std::max<std::int64_t>(0, batch.start_pos[s] - window + 1) : 0;
    if (count > 0)
      check_entries(op, pages, batch.slots[s], begin, batch.start_pos[s] + count, -1, num_pages);
  }
}

ConvRows conv_arg(const char* op, const Tensor& conv_rows, std::int64_t layer, std::int64_t channel,
                  std::int64_t num_channels, std::int64_t num_slots, DType dtype) {
  conv_rows.dtype(dtype).shape({num_slots, kAny, contract::kConvTaps - 1, kAny}).rows_contiguous();
  if (layer < 0 || layer >= conv_rows.size(1))
    refuse(std::string(op) + ": conv layer",
           range_text(0, conv_rows.size(1)) + " (layers of conv_rows)", layer);
  if (channel < 0 || channel > conv_rows.size(3) - num_channels)
    conv_rows.refuse("at least " + std::to_string(num_channels) + " channels wide from channel " +
                         std::to_string(channel),
                     std::to_string(conv_rows.size(3)) + " wide");
  const std::int64_t first = layer * conv_rows.stride(1) + channel;
  return {conv_rows.data<char>() + first * static_cast<std::int64_t>(size_of(dtype)),
          conv_rows.stride(0), conv_rows.stride(2)};
}

}  // namespace tml
