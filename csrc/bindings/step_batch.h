// Binding-side parsing of what the stateful ops share (ops/step_batch.h). Everything a kernel would
// index with is checked here, by name, before any state is touched.
#pragma once

#include "bindings/tensor.h"
#include "ops/step_batch.h"

namespace tml {

// cu_tokens int32 [num_seqs + 1] rising from 0 to num_tokens, slots int32 [num_seqs] distinct in
// [0, num_slots), start_pos int64 [num_seqs] >= 0, visible_end int64 [num_tokens] between the token
// itself and the sequence's last token of the step. The last two may be None where the op does not
// read them; their pointers are null then.
StepBatch batch_arg(const char* op, nb::handle cu_tokens, nb::handle slots, nb::handle start_pos,
                    nb::handle visible_end, std::int64_t num_tokens, std::int64_t num_slots);

// Whole sequences packed one after the other: cu_tokens alone, as in batch_arg (num_seqs >= 0 read
// off its length); slots, start_pos and visible_end are null.
StepBatch packed_arg(const char* op, nb::handle cu_tokens, std::int64_t num_tokens);

// One layer of a pool [num_pages, num_layers, num_kv_heads, 2, 128 * head_dim] (contiguous, 64-byte
// aligned) of the given type, and its table int32 [num_slots, max_pages].
KvPages pages_arg(const char* op, const Tensor& pages, std::int64_t layer, const Tensor& table,
                  DType dtype);

// Every table entry the batch writes (its new positions) is a page id in [0, num_pages).
void check_written_pages(const char* op, const StepBatch& batch, const KvPages& pages,
                         std::int64_t num_pages);

// Every table entry the batch can see (from start_pos - window + 1, or from 0 if window is 0, to
// the last new position) is -1 (dropped: contributes nothing) or a page id in [0, num_pages).
void check_visible_pages(const char* op, const StepBatch& batch, const KvPages& pages,
                         std::int64_t num_pages, std::int64_t window);

// Channels [channel, channel + num_channels) of one layer of conv_rows
// [num_slots, num_layers, 3, row width] of the given type.
ConvRows conv_arg(const char* op, const Tensor& conv_rows, std::int64_t layer, std::int64_t channel,
                  std::int64_t num_channels, std::int64_t num_slots, DType dtype);

}  // namespace tml
