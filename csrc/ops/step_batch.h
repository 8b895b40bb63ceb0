// What the stateful ops share: a ragged batch of sequences, and where their state lives. A sequence
// has a fixed slot; its page tables are rows of int32 [num_slots, max_pages] (logical page -> page
// id, -1 = none or dropped) and its convolution state is a row of conv_rows.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace tml {

// Sequence s owns tokens [cu_tokens[s], cu_tokens[s + 1]) of the step; its first new token has
// absolute position start_pos[s].
struct StepBatch {
  const std::int32_t* cu_tokens;    // [num_seqs + 1]
  const std::int32_t* slots;        // [num_seqs]
  const std::int64_t* start_pos;    // [num_seqs]
  const std::int64_t* visible_end;  // [num_tokens] last visible key position of each token
  std::int32_t num_seqs;
  std::int64_t num_tokens;
};

// One layer's K and V in one pool. A page holds, per KV head, a K block of 128 * head_dim elements
// then a V block of the same size, both in k-steps (see panel layout):
//   bf16: K [head_dim / 2][128 keys][2]   V [64 key pairs][head_dim][2]
//   fp32: K [head_dim][128 keys]          V [128 keys][head_dim]
struct KvPages {
  void* pages;                    // page 0, this layer, head 0
  std::int64_t page_stride;       // elements from one page to the next
  std::int64_t head_stride;       // elements from one KV head to the next: 2 * 128 * head_dim
  const std::int32_t* table;      // [num_slots, max_pages]
  std::int64_t table_row_stride;  // max_pages
  std::int32_t num_kv_heads;
  std::int32_t head_dim;
};

// The last three inputs (oldest first) of one convolution of one layer, for every slot.
struct ConvRows {
  void* rows;                // slot 0, oldest row, first channel of this convolution
  std::int64_t slot_stride;  // elements from one slot to the next
  std::int64_t row_stride;   // elements from one row to the next
};

}  // namespace tml
