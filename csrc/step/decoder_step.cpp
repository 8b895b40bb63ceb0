#include "step/decoder_step.h"

#include <cstddef>

#include "core/memory.h"
#include "core/team.h"
#include "cpu/cpu.h"

namespace tml {
namespace {

// Workspace of one step, carved from the calling thread's step scratch.
class Workspace {
 public:
  explicit Workspace(std::size_t num_bytes)
      : next_(static_cast<char*>(scratch(Scratch::kStep, num_bytes))) {}
  static std::size_t rounded(std::size_t num_bytes) { return (num_bytes + 63) / 64 * 64; }
  template <class T = void>
  T* take(std::size_t num_bytes) {
    char* start = next_;
    next_ += rounded(num_bytes);
    return reinterpret_cast<T*>(start);
  }

 private:
  char* next_;
};

template <class T>
T largest(const std::vector<DecoderLayer>& layers, T (*of)(const DecoderLayer&)) {
  T most = 0;
  for (const DecoderLayer& layer : layers) most = of(layer) > most ? of(layer) : most;
  return most;
}

void* at(void* base, std::int64_t elements, DType dtype) {
  return static_cast<char*>(base) + elements * static_cast<std::int64_t>(size_of(dtype));
}

}  // namespace

void DecoderStep::run(void* x, void* h, const StepBatch& batch, const DecoderState& state,
                      int num_threads) const {
  const std::int64_t num_tokens = batch.num_tokens, hidden = shape_.hidden;
  if (num_tokens == 0) return;
  const DType dtype = shape_.dtype;
  const auto rows = static_cast<std::size_t>(num_tokens);
  const std::size_t size = size_of(dtype);
  const std::int64_t q_width = largest<std::int64_t>(
      layers_, [](const DecoderLayer& l) { return std::int64_t{l.num_heads} * l.head_dim; });
  const std::int64_t heads = largest<std::int64_t>(
      layers_, [](const DecoderLayer& l) { return std::int64_t{l.num_heads}; });
  const std::int64_t kv_width = largest<std::int64_t>(
      layers_, [](const DecoderLayer& l) { return std::int64_t{l.num_kv_heads} * l.head_dim; });
  const std::int64_t top_k =
      largest<std::int64_t>(layers_, [](const DecoderLayer& l) { return std::int64_t{l.top_k}; });
  const std::int64_t shared = largest<std::int64_t>(
      layers_, [](const DecoderLayer& l) { return std::int64_t{l.num_shared}; });

  const std::size_t hidden_bytes = rows * static_cast<std::size_t>(hidden) * size;
  const std::size_t qkvr_bytes =
      rows * static_cast<std::size_t>(q_width + 2 * kv_width + heads * shape_.d_rel) * size;
  const std::size_t q_bytes = rows * static_cast<std::size_t>(q_width) * size;
  const std::size_t r_bytes = rows * static_cast<std::size_t>(heads * shape_.d_rel) * size;
  const std::size_t id_bytes = rows * static_cast<std::size_t>(top_k) * 4;
  const std::size_t gamma_bytes = rows * static_cast<std::size_t>(shared) * 4;
  Workspace workspace(2 * Workspace::rounded(hidden_bytes) + Workspace::rounded(qkvr_bytes) +
                      2 * Workspace::rounded(q_bytes) + Workspace::rounded(r_bytes) +
                      2 * Workspace::rounded(id_bytes) + Workspace::rounded(gamma_bytes));
  void* normed = workspace.take(hidden_bytes);
  void* branch = workspace.take(hidden_bytes);  // a sub-layer's output before its convolution
  void* qkvr = workspace.take(qkvr_bytes);
  void* q = workspace.take(q_bytes);
  void* attended = workspace.take(q_bytes);
  void* r = workspace.take(r_bytes);
  auto* expert_ids = workspace.take<std::int32_t>(id_bytes);
  auto* weights = workspace.take<float>(id_bytes);
  auto* gammas = workspace.take<float>(gamma_bytes);

  const auto linear = [&](const void* input, const void* weight, void* output, std::int64_t in_dim,
                          std::int64_t out_dim) {
    cpu::linear({input, weight, output, in_dim, out_dim, num_tokens, in_dim, out_dim, dtype, dtype,
                 num_threads});
  };
  const auto norm = [&](const void* weight, void* output, float divisor) {
    cpu::rms_norm({x, weight, output, hidden, hidden, num_tokens, hidden, shape_.eps, divisor,
                   false, dtype, num_threads});
  };
  const auto add_branch = [&](const float* conv, std::int64_t channel, std::size_t index,
                              const void* norm_weight) {
    const ConvRows conv_rows{
        at(state.conv_rows, static_cast<std::int64_t>(index) * state.conv_layer_stride + channel,
           dtype),
        state.conv_slot_stride, state.conv_row_stride};
    cpu::sconv_norm({branch, x, conv, norm_weight, norm_weight != nullptr ? normed : nullptr, batch,
                     conv_rows, hidden, hidden, hidden, hidden, shape_.eps, dtype, num_threads});
  };

  const auto all_layers = [&] {
    norm(layers_.front().attn_norm, normed, 1.0f);
    for (std::size_t index = 0; index < layers_.size(); ++index) {
      const DecoderLayer& layer = layers_[index];
      const std::int64_t layer_q = std::int64_t{layer.num_heads} * layer.head_dim;
      const std::int64_t layer_kv = std::int64_t{layer.num_kv_heads} * layer.head_dim;
      const std::int64_t layer_qkvr =
          layer_q + 2 * layer_kv + std::int64_t{layer.num_heads} * shape_.d_rel;
      const int kind = layer.is_sliding ? 1 : 0;
      const std::int64_t head_stride = std::int64_t{2} * 128 * layer.head_dim;
      const KvPages pages{
          at(state.pages[kind], layer.pool_layer * layer.num_kv_heads * head_stride, dtype),
          state.page_stride[kind],
          head_stride,
          state.table[kind],
          state.table_row_stride[kind],
          layer.num_kv_heads,
          layer.head_dim};
      void* conv =
          at(state.conv_rows, static_cast<std::int64_t>(index) * state.conv_layer_stride, dtype);
      const ConvRows k_rows{conv, state.conv_slot_stride, state.conv_row_stride};
      const ConvRows v_rows{at(conv, state.kv_width, dtype), state.conv_slot_stride,
                            state.conv_row_stride};

      linear(normed, layer.qkvr, qkvr, hidden, layer_qkvr);
      cpu::attn_prologue({qkvr, layer.k_conv, layer.v_conv, layer.q_norm, layer.k_norm, q, r, batch,
                          pages, k_rows, v_rows, layer_qkvr, layer.num_heads, shape_.d_rel,
                          shape_.eps, layer.is_sliding ? 0.0f : shape_.log_floor, shape_.log_alpha,
                          dtype, num_threads});
      cpu::session_attn({q, r, layer.rel_bank, attended, nullptr, pages, batch,
                         layer.is_sliding ? shape_.window : 0, layer.rel_len, shape_.d_rel,
                         layer.num_heads, 1.0f / static_cast<float>(layer.head_dim), dtype,
                         num_threads});
      linear(attended, layer.o, branch, layer_q, hidden);
      add_branch(layer.attn_sconv, 2 * state.kv_width, index, layer.mlp_norm);

      if (layer.router != nullptr) {
        cpu::router({normed, layer.router, layer.router_bias, expert_ids, weights, gammas, nullptr,
                     hidden, num_tokens, hidden, layer.num_experts, layer.num_shared, layer.top_k,
                     layer.scale, dtype, num_threads});
      } else {
        for (std::int64_t t = 0; t < num_tokens; ++t) {
          expert_ids[t] = 0;
          weights[t] = layer.scale;
        }
      }
      cpu::moe({normed, expert_ids, weights, gammas, layer.w13, layer.w2, branch, nullptr, hidden,
                hidden, num_tokens, hidden, layer.width, layer.num_experts, layer.num_shared,
                layer.top_k, dtype, num_threads});
      const bool is_last = index + 1 == layers_.size();
      add_branch(layer.mlp_sconv, 2 * state.kv_width + hidden, index,
                 is_last ? nullptr : layers_[index + 1].attn_norm);
    }
    norm(shape_.final_norm, h, shape_.mup);
  };
  const auto run_layers = [](const void* layers) {
    (*static_cast<const decltype(all_layers)*>(layers))();
  };
  with_team(num_threads, run_layers, &all_layers);
}

}  // namespace tml
