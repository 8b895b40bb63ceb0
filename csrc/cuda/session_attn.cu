// session_attn: how many parts share a tile's segments (a matter of speed alone).
#include "cuda/attn.h"
#include "cuda/cuda.h"

namespace tml::cuda {

AttnParams attn_plan(const SessionAttnParams& p, int num_sms, int num_parts, void* workspace,
                     std::size_t* num_bytes) {
  AttnParams out{};
  out.op = p;
  const std::int32_t group = p.num_heads / p.kv.num_kv_heads;
  out.tokens_per_tile = kAttnRows / group;
  out.num_tiles = num_attn_tiles(p.batch.num_tokens, p.batch.num_seqs, out.tokens_per_tile);
  // Positions live on the device: what the table has room for, or what a window spans.
  std::int64_t segments = (p.kv.table_row_stride + kUnitsPerSegment - 1) / kUnitsPerSegment;
  if (p.window > 0) {
    const std::int64_t span = (p.window + p.batch.num_tokens) / contract::kSegmentLen + 2;
    segments = span < segments ? span : segments;
  }
  out.max_segments = static_cast<std::int32_t>(segments > 0 ? segments : 1);
  const std::int64_t units = static_cast<std::int64_t>(out.num_tiles) * p.kv.num_kv_heads;
  const std::int64_t fill = units > 0 ? num_sms / units : 1;
  const std::int64_t parts = num_parts > 0 ? num_parts : fill;
  out.num_parts = static_cast<std::int32_t>(parts < 1                  ? 1
                                            : parts < out.max_segments ? parts
                                                                       : out.max_segments);
  Workspace memory(workspace);
  out.partials = memory.take<float>(
      out.num_parts > 1 ? units * out.max_segments * kAttnThreads * (p.kv.head_dim / 2 + 4) : 0);
  *num_bytes = memory.used();
  return out;
}

std::size_t session_attn_workspace_bytes(const SessionAttnParams& p, int num_sms) {
  std::size_t num_bytes;
  attn_plan(p, num_sms, 0, nullptr, &num_bytes);
  return num_bytes;
}

void session_attn(const SessionAttnParams& p, const Launch& launch) {
  if (p.batch.num_tokens == 0) return;
  const auto refuse = [](const char* what, std::int64_t got) {
    throw std::invalid_argument(std::string("session_attn: ") + what + ", got " +
                                std::to_string(got));
  };
  if (p.kv.head_dim != 64 && p.kv.head_dim != 128)
    refuse("head_dim must be 64 or 128 on cuda", p.kv.head_dim);
  if (p.rel_dim % 2 != 0) refuse("the relative dimension must be even on cuda", p.rel_dim);
  std::size_t needed;
  const AttnParams params = attn_plan(p, launch.num_sms, 0, launch.workspace, &needed);
  check_workspace("session_attn", launch, needed);
  if (p.kv.head_dim == 64) return session_attn_sized<64>(params, launch);
  session_attn_sized<128>(params, launch);
}

}  // namespace tml::cuda
