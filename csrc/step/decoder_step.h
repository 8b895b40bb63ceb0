// decoder_step: every layer of the decoder over one ragged step, in one call. It only strings the
// ops together (same launchers, same bits as calling them one by one); the caller owns the state.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "ops/step_batch.h"

namespace tml {

// One layer's weights, packed where an op wants them packed; see the op headers for the layouts.
struct DecoderLayer {
  bool is_sliding;
  std::int32_t pool_layer;  // index of this layer among the layers of its kind
  std::int32_t num_heads, num_kv_heads, head_dim, rel_len;
  const void* attn_norm;  // [hidden]
  const void* qkvr;       // packed [(q | k | v | r), hidden]
  const void* o;          // packed [hidden, num_heads * head_dim]
  const float* k_conv;    // [num_kv_heads * head_dim, 4]
  const float* v_conv;
  const void* q_norm;  // [head_dim]
  const void* k_norm;
  const void* rel_bank;     // packed by pack_rel_bank
  const float* attn_sconv;  // [hidden, 4]
  const void* mlp_norm;     // [hidden]
  const float* mlp_sconv;   // [hidden, 4]
  // Experts; a dense layer is one expert with a fixed weight and no router.
  std::int32_t num_experts, num_shared, top_k, width;
  const void* w13;
  const void* w2;
  const void* router;        // packed fp32 [num_experts + num_shared, hidden]; null: dense
  const float* router_bias;  // [num_experts]
  float scale;               // route_scale * global_scale; a dense layer's output scale
};

struct DecoderShape {
  std::int32_t hidden, window, d_rel;
  float eps, mup, log_floor, log_alpha;  // log_floor 0: no log scaling
  const void* final_norm;
  DType dtype;
};

// Where the sequences' state lives; strides in elements.
struct DecoderState {
  void* pages[2];  // [global, sliding]: [num_pages, layers_of_kind, kv_heads, 2, 128 * head_dim]
  std::int64_t page_stride[2];
  const std::int32_t* table[2];  // [num_slots, max_pages]
  std::int64_t table_row_stride[2];
  void* conv_rows;  // [num_slots, num_layers, 3, 2 * kv_width + 2 * hidden]: k, v, attn, mlp
  std::int64_t conv_slot_stride, conv_layer_stride, conv_row_stride;
  std::int64_t kv_width;  // widest K of any layer: where the v part begins
};

class DecoderStep {
 public:
  explicit DecoderStep(const DecoderShape& shape) : shape_(shape) {}
  void add_layer(const DecoderLayer& layer) { layers_.push_back(layer); }
  const DecoderShape& shape() const { return shape_; }
  const std::vector<DecoderLayer>& layers() const { return layers_; }

  // x [num_tokens, hidden] holds the embeddings and is overwritten by the residual stream; h gets
  // the final norm of it over mup. K, V and convolution rows of the batch are written in place.
  void run(void* x, void* h, const StepBatch& batch, const DecoderState& state,
           int num_threads) const;

 private:
  DecoderShape shape_;
  std::vector<DecoderLayer> layers_;
};

}  // namespace tml
