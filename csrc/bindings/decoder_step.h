// The decoder's step as Python holds it, and where the sequences' state is that it works on.
#pragma once

#include "bindings/tensor.h"
#include "ops/step_batch.h"
#include "step/decoder_step.h"

namespace tml {

// A KvStore's tensors.
struct PyKvStore {
  nb::handle pages[2], table[2];  // [global, sliding]
  nb::handle conv_rows;
};

// The step and the tensors its pointers reach into.
class PyDecoderStep {
 public:
  PyDecoderStep(std::int32_t hidden, std::int32_t window, std::int32_t d_rel, float eps, float mup,
                float log_floor, float log_alpha, nb::handle final_norm);

  void add_layer(bool is_sliding, std::int32_t num_heads, std::int32_t num_kv_heads,
                 std::int32_t head_dim, std::int32_t rel_len, std::int32_t num_experts,
                 std::int32_t num_shared, std::int32_t top_k, std::int32_t width, float scale,
                 const nb::typed<nb::dict, nb::str, nb::object>& weights);

  void run(nb::handle x, nb::handle out, nb::handle cu_tokens, nb::handle slots,
           nb::handle start_pos, nb::handle visible_end, nb::handle global_pages,
           nb::handle sliding_pages, nb::handle global_table, nb::handle sliding_table,
           nb::handle conv_rows, int num_threads) const;

  const DecoderStep& step() const { return step_; }

  // Slots of the store; refuses one whose conv_rows do not fit this decoder, or a decoder without
  // layers.
  std::int64_t num_slots(const char* op, const PyKvStore& kv) const;

  // Where the kernels find the store's memory; refuses one that does not fit this decoder, or a
  // batch that would write where it has no page.
  DecoderState state(const char* op, const PyKvStore& kv, const StepBatch& batch) const;

 private:
  void keep(nb::handle tensor) { kept_.append(tensor); }
  Tensor take(const nb::dict& weights, const char* name);
  std::int64_t kv_width() const;

  DecoderStep step_;
  nb::list kept_;
};

}  // namespace tml
