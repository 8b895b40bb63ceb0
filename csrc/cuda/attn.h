// session_attn on the device. A block of four warps owns 64 query rows (tokens x heads of one KV
// head's group; row = token * group + head) and walks pages of 128 keys, a unit each: K and V of a
// page arrive as one contiguous copy each, two pages deep. A warp holds sixteen rows.
//
// The contract of ops/session_attn.h with the tensor core's chains (k16 groups, ascending), and:
// sum of a unit's p: a lane adds its 32 values pair by pair in ascending keys, then lanes 1, 2
// apart. bias = r P of every (row, distance) is one more chain; nothing in between is rounded.
//
// Blocks: (tile of 64 rows, KV head, part). One part walks all segments and folds them as it goes.
// Several parts take every num_parts-th segment each and leave a partial a segment, which
// session_attn_fold adds in order: the same fold, so the same bits.
#pragma once

#include "cuda/gemm.h"
#include "ops/session_attn.h"

namespace tml::cuda {

inline constexpr int kAttnRows = 64;
inline constexpr int kAttnThreads = 128;
inline constexpr int kUnit = contract::kPageLen;
inline constexpr int kUnitsPerSegment = contract::kSegmentLen / contract::kPageLen;
inline constexpr float kMasked = -1e30f;
// Bias of a warp: 128 keys and up to fifteen more distances, rows apart by an odd number of fours.
inline constexpr int kBiasTiles = 18;
inline constexpr int kBiasStride = 148;

struct AttnParams {
  SessionAttnParams op;
  float* partials;  // [tile][KV head][segment of the tile]: max, sum, values as threads hold them
  std::int32_t tokens_per_tile, num_tiles, num_parts, max_segments;
};

// Tile ids are counted so that a tile finds its sequence without a plan: sequence s owns the ids
// from cu_tokens[s] / tokens_per_tile + s on; some ids stay empty.
struct AttnTile {
  std::int32_t seq, num_tokens;
  std::int64_t token;  // in the step
  std::int64_t pos;    // of the first token
};
TML_HOST_DEVICE std::int32_t first_tile(const std::int32_t* cu_tokens, std::int32_t seq,
                                        std::int32_t tokens_per_tile) {
  return cu_tokens[seq] / tokens_per_tile + seq;
}
TML_HOST_DEVICE AttnTile attn_tile(const StepBatch& batch, std::int32_t tokens_per_tile,
                                   std::int32_t id) {
  std::int32_t low = 0, high = batch.num_seqs - 1;
  while (low < high) {
    const std::int32_t middle = (low + high + 1) / 2;
    if (first_tile(batch.cu_tokens, middle, tokens_per_tile) <= id)
      low = middle;
    else
      high = middle - 1;
  }
  const std::int64_t begin = batch.cu_tokens[low], end = batch.cu_tokens[low + 1];
  const std::int64_t token =
      begin + static_cast<std::int64_t>(id - first_tile(batch.cu_tokens, low, tokens_per_tile)) *
                  tokens_per_tile;
  const std::int64_t left = end - token;
  return {low,
          static_cast<std::int32_t>(left < 0                 ? 0
                                    : left < tokens_per_tile ? left
                                                             : tokens_per_tile),
          token, batch.start_pos[low] + token - begin};
}
TML_HOST_DEVICE std::int32_t num_attn_tiles(std::int64_t num_tokens, std::int32_t num_seqs,
                                            std::int32_t tokens_per_tile) {
  return static_cast<std::int32_t>(num_tokens / tokens_per_tile) + num_seqs;
}

// Max, sum and values of some keys for the two rows a thread holds (row g and g + 8 of its warp).
template <int kDim>
struct AttnState {
  float m[2], l[2];
  float o[kDim / 2];  // fragment registers: o[4 * j + i] of channels 8 j ...

  TML_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      m[i] = kMasked;
      l[i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) o[i] = 0.0f;
  }
};

// The weights of fold(a, b), and its max and sum into a.
TML_DEVICE void fold_sums(float (&ma)[2], float (&la)[2], const float (&mb)[2],
                          const float (&lb)[2], float (&wa)[2], float (&wb)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float m = ma[i] > mb[i] ? ma[i] : mb[i];
    wa[i] = exp_negative(__fadd_rn(ma[i], -m));
    wb[i] = exp_negative(__fadd_rn(mb[i], -m));
    ma[i] = m;
    la[i] = __fmaf_rn(lb[i], wb[i], __fmul_rn(la[i], wa[i]));
  }
}
TML_DEVICE float fold_value(float a, float wa, float b, float wb) {
  return __fmaf_rn(b, wb, __fmul_rn(a, wa));
}

template <int kDim>
TML_DEVICE void write_rows(const SessionAttnParams& op, const AttnTile& tile, std::int32_t kv_head,
                           const AttnState<kDim>& total) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int32_t group = op.num_heads / op.kv.num_kv_heads;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::int32_t row = static_cast<std::int32_t>(threadIdx.x / 32) * 16 + lane / 4 + half * 8;
    if (row >= tile.num_tokens * group) continue;
    const std::int64_t target =
        (tile.token + row / group) * op.num_heads + kv_head * group + row % group;
    const bool is_empty = total.m[half] == kMasked && total.l[half] == 0.0f;
    const float sum = is_empty ? 1.0f : total.l[half];
    auto* const out = static_cast<Bf16*>(op.out) + target * kDim + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      const float a = __fadd_rn(__fdiv_rn(total.o[4 * j + 2 * half], sum), 0.0f);
      const float b = __fadd_rn(__fdiv_rn(total.o[4 * j + 2 * half + 1], sum), 0.0f);
      *reinterpret_cast<std::uint32_t*>(out + j * 8) = pack_bf16(a, b);
    }
    if (op.lse != nullptr && lane % 4 == 0)
      op.lse[target] =
          is_empty ? bits_to_float(0xff800000u) : __fadd_rn(total.m[half], log_poly(total.l[half]));
  }
}

// Units a tile sees, and its partial of one segment.
struct AttnSpan {
  std::int32_t unit_begin, unit_end, last_key;  // last_key: visible to any token, from tile.pos
  TML_HOST_DEVICE std::int32_t segment_begin() const { return unit_begin / kUnitsPerSegment; }
  TML_HOST_DEVICE std::int32_t segment_end() const { return (unit_end - 1) / kUnitsPerSegment + 1; }
};
TML_DEVICE AttnSpan span_of(const SessionAttnParams& op, const AttnTile& tile) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int last = 0;
  for (std::int32_t t = lane; t < tile.num_tokens; t += 32) {
    const auto end = static_cast<int>(op.batch.visible_end[tile.token + t] - tile.pos);
    last = end > last ? end : last;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const int other = __shfl_xor_sync(kFullMask, last, mask);
    last = other > last ? other : last;
  }
  const std::int64_t first = op.window > 0 ? tile.pos - op.window + 1 : 0;
  return {static_cast<std::int32_t>((first > 0 ? first : 0) / kUnit),
          static_cast<std::int32_t>((tile.pos + last) / kUnit + 1), last};
}
template <int kDim>
TML_DEVICE float* partial_of(const AttnParams& p, std::int32_t tile, std::int32_t kv_head,
                             std::int32_t segment) {
  const std::int64_t index =
      (static_cast<std::int64_t>(tile) * p.op.kv.num_kv_heads + kv_head) * p.max_segments + segment;
  return p.partials + index * kAttnThreads * (kDim / 2 + 4);
}

template <int kDim>
struct AttnShared {
  static constexpr int kBlockBytes = kUnit * kDim * 2;  // K or V of a page
  static constexpr int kQueryBytes = kAttnRows * kDim * 2;
  static constexpr int kTotalBytes = kAttnThreads * kDim / 2 * 4;
  static constexpr int kPages = 0;  // [2][K, V]
  static constexpr int kQuery = kPages + 4 * kBlockBytes;
  static constexpr int kBias = kQuery + kQueryBytes;
  static constexpr int kTotal = kBias + 4 * 16 * kBiasStride * 4;
  static constexpr int kBarriers = kTotal + kTotalBytes;  // [2][K, V]
  static constexpr int kBytes = kBarriers + 4 * 8;
};

template <int kDim>
class AttnBlock {
 public:
  using Shared = AttnShared<kDim>;

  TML_DEVICE AttnBlock(const AttnParams& p, const AttnTile& tile, const AttnSpan& span,
                       std::int32_t kv_head)
      : op_(p.op),
        tile_(tile),
        span_(span),
        kv_head_(kv_head),
        group_(p.op.num_heads / p.op.kv.num_kv_heads),
        warp_(static_cast<int>(threadIdx.x / 32)),
        lane_(static_cast<int>(threadIdx.x % 32)),
        shared_(shared_memory()),
        table_(p.op.kv.table + p.op.batch.slots[tile.seq] * p.op.kv.table_row_stride) {
    bias_ = reinterpret_cast<float*>(shared_ + Shared::kBias) + warp_ * 16 * kBiasStride;
    barriers_ = reinterpret_cast<std::uint64_t*>(shared_ + Shared::kBarriers);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int32_t row = warp_ * 16 + lane_ / 4 + half * 8;
      const std::int32_t token = row / group_;
      offset_[half] = token;
      const bool is_row = token < tile.num_tokens;
      seen_end_[half] =
          is_row ? static_cast<std::int32_t>(p.op.batch.visible_end[tile.token + token] - tile.pos)
                 : -1 - (1 << 30);
    }
  }

  TML_DEVICE bool is_present(std::int32_t unit) const { return table_[unit] >= 0; }
  TML_DEVICE std::uint64_t* barrier(int stage, int part) const {
    return barriers_ + stage * 2 + part;
  }
  TML_DEVICE unsigned char* block(int stage, int part) const {
    return shared_ + Shared::kPages + (stage * 2 + part) * Shared::kBlockBytes;
  }

  TML_DEVICE void load_page(std::int32_t unit, int stage, std::uint64_t policy) const {
    const auto* page = static_cast<const Bf16*>(op_.kv.pages) + table_[unit] * op_.kv.page_stride +
                       kv_head_ * op_.kv.head_stride;
    for (int part = 0; part < 2; ++part) {
      mbarrier_arrive_expect(barrier(stage, part), Shared::kBlockBytes);
      bulk_load(block(stage, part), page + part * kUnit * kDim, Shared::kBlockBytes,
                barrier(stage, part), policy);
    }
  }

  // The rows' queries as core tiles; absent rows are zero.
  TML_DEVICE void load_queries() const {
    auto* const query = reinterpret_cast<Bf16*>(shared_ + Shared::kQuery);
    for (int i = static_cast<int>(threadIdx.x); i < kAttnRows * (kDim / 8); i += kAttnThreads) {
      const int row = i / (kDim / 8), channel = i % (kDim / 8) * 8;
      uint4 value{0, 0, 0, 0};
      if (row < tile_.num_tokens * group_)
        value = *reinterpret_cast<const uint4*>(static_cast<const Bf16*>(op_.q) +
                                                head_row(row) * kDim + channel);
      *reinterpret_cast<uint4*>(query + page_offset(row, channel, kDim)) = value;
    }
  }

  // state = fold(state, unit), K and V of the unit being in `stage`.
  TML_DEVICE void walk_unit(std::int32_t unit, int stage, std::uint32_t parity,
                            AttnState<kDim>& state) {
    const std::int64_t base64 = static_cast<std::int64_t>(unit) * kUnit - tile_.pos;
    const auto base = static_cast<std::int32_t>(base64);  // of the first key, from the tile's pos
    mbarrier_wait(barrier(stage, 0), parity);
    float s[kUnit / 2];
    multiply_keys(block(stage, 0), s);
    mbarrier_wait(barrier(stage, 1), parity);
    clear_unwritten(base, block(stage, 1));
    const bool has_bias = load_bias(base);
    float m[2], l[2];
    std::uint32_t probs[kUnit / 4];
    softmax(base, has_bias, s, m, l, probs);
    float weight_state[2], weight_unit[2];
    fold_sums(state.m, state.l, m, l, weight_state, weight_unit);
    weigh_values(block(stage, 1), probs, state, weight_state, weight_unit);
  }

 private:
  // Row of q, r and out.
  TML_DEVICE std::int64_t head_row(int row) const {
    return (tile_.token + row / group_) * op_.num_heads + kv_head_ * group_ + row % group_;
  }

  // s[4 j ...] = q . k of keys 8 j ...: chains over the channels.
  TML_DEVICE void multiply_keys(const unsigned char* keys, float (&s)[kUnit / 2]) const {
#pragma unroll
    for (int i = 0; i < kUnit / 2; ++i) s[i] = 0.0f;
    const auto* query = reinterpret_cast<const Bf16*>(shared_ + Shared::kQuery);
    const auto* k = reinterpret_cast<const Bf16*>(keys);
    const int row = lane_ % 8, tile = lane_ / 8;
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      std::uint32_t a[4];
      load_tiles(a, query + page_offset(warp_ * 16 + tile % 2 * 8 + row, d + tile / 2 * 8, kDim));
#pragma unroll
      for (int j = 0; j < kUnit / 16; ++j) {
        std::uint32_t b[4];
        load_tiles(b, k + page_offset(j * 16 + tile / 2 * 8 + row, d + tile % 2 * 8, kDim));
        mma(*reinterpret_cast<float (*)[4]>(s + 8 * j), a, b[0], b[1]);
        mma(*reinterpret_cast<float (*)[4]>(s + 8 * j + 4), a, b[2], b[3]);
      }
    }
  }

  // V of keys that no token of the tile sees may be anything, even NaN, and 0 * NaN is NaN.
  TML_DEVICE void clear_unwritten(std::int32_t base, unsigned char* values) const {
    const std::int32_t first = span_.last_key + 1 - base;
    if (first >= kUnit) return;
    auto* const v = reinterpret_cast<Bf16*>(values);
    for (int i = static_cast<int>(threadIdx.x); i < (kUnit - first) * (kDim / 8); i += kAttnThreads)
      *reinterpret_cast<uint4*>(v + page_offset(first + i / (kDim / 8), i % (kDim / 8) * 8, kDim)) =
          uint4{0, 0, 0, 0};
    proxy_fence();  // the copy engine will write here again
    __syncthreads();
  }

  // bias_[row][c] = r . P at the distances of the warp's rows; false: zero for all of them. Column
  // c of row q belongs to key c - (last row's position - q).
  TML_DEVICE bool load_bias(std::int32_t base) const {
    const std::int32_t first = warp_ * 16 / group_, last = (warp_ * 16 + 15) / group_;
    if (last - base < 0 || first - base - (kUnit - 1) >= op_.rel_len) return false;
    const int g = lane_ / 4, t = lane_ % 4;
    const auto* bank = static_cast<const std::uint32_t*>(op_.rel_bank);
    const std::int64_t width = op_.rel_len + 2 * kRelPad;
    const std::int64_t column = kRelPad + op_.rel_len - 1 - (last - base);
    const std::int32_t steps = (op_.rel_dim + 1) / 2;
    const std::int32_t num_columns = kUnit + last - first;
    __syncwarp();  // the last unit's readers are done
    for (int tile = 0; tile < kBiasTiles && tile * 8 < num_columns; ++tile) {
      float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      const std::int64_t at = column + tile * 8 + g;
      const bool is_inside = at >= 0 && at < width;
      for (std::int32_t step = 0; step < steps; step += 8) {
        std::uint32_t a[4], b[2];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[i] = rel_pair(warp_ * 16 + g + i % 2 * 8, step + t + i / 2 * 4);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const std::int32_t k = step + t + i * 4;
          b[i] = is_inside && k < steps ? bank[k * width + at] : 0u;
        }
        mma(acc, a, b[0], b[1]);
      }
      float* const out = bias_ + g * kBiasStride + tile * 8 + t * 2;
      out[0] = acc[0];
      out[1] = acc[1];
      out[8 * kBiasStride] = acc[2];
      out[8 * kBiasStride + 1] = acc[3];
    }
    __syncwarp();
    return true;
  }
  // Elements 2 k and 2 k + 1 of a row's r.
  TML_DEVICE std::uint32_t rel_pair(int row, std::int32_t k) const {
    if (row >= tile_.num_tokens * group_ || 2 * k >= op_.rel_dim) return 0;
    return *reinterpret_cast<const std::uint32_t*>(static_cast<const Bf16*>(op_.r) +
                                                   head_row(row) * op_.rel_dim + 2 * k);
  }

  TML_DEVICE void softmax(std::int32_t base, bool has_bias, float (&s)[kUnit / 2], float (&m)[2],
                          float (&l)[2], std::uint32_t (&probs)[kUnit / 4]) const {
    const int g = lane_ / 4, t = lane_ % 4;
    const std::int32_t last = (warp_ * 16 + 15) / group_;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* bias = bias_ + (g + half * 8) * kBiasStride + (last - offset_[half]);
      const std::int32_t to = seen_end_[half] - base;  // last visible key of the unit
      const std::int64_t from64 = op_.window > 0 ? offset_[half] - op_.window + 1 - base : 0;
      const auto from = static_cast<std::int32_t>(from64 > kUnit ? kUnit : from64);
      float top = kMasked;
#pragma unroll
      for (int j = 0; j < kUnit / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = j * 8 + t * 2 + i;
          float& x = s[4 * j + 2 * half + i];
          x = __fmaf_rn(x, op_.scale, has_bias ? bias[key] : 0.0f);
          x = key >= from && key <= to ? x : kMasked;
          top = x > top ? x : top;
        }
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) {
        const float other = __shfl_xor_sync(kFullMask, top, mask);
        top = other > top ? other : top;
      }
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kUnit / 8; ++j) {
        float p[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = j * 8 + t * 2 + i;
          const bool is_visible = key >= from && key <= to;
          p[i] = is_visible ? exp_negative(__fadd_rn(s[4 * j + 2 * half + i], -top)) : 0.0f;
        }
        sum = __fadd_rn(sum, __fadd_rn(p[0], p[1]));
        probs[2 * j + half] = pack_bf16(p[0], p[1]);
      }
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2)
        sum = __fadd_rn(sum, __shfl_xor_sync(kFullMask, sum, mask));
      m[half] = top;
      l[half] = sum;
    }
  }

  // o = fold(o, p . V): chains over the keys, eight columns pairwise at a time.
  TML_DEVICE void weigh_values(const unsigned char* values, const std::uint32_t (&probs)[kUnit / 4],
                               AttnState<kDim>& state, const float (&weight_state)[2],
                               const float (&weight_unit)[2]) const {
    const auto* v = reinterpret_cast<const Bf16*>(values);
    const int row = lane_ % 8, tile = lane_ / 8;
#pragma unroll
    for (int j = 0; j < kDim / 16; ++j) {
      float acc[2][4] = {};
#pragma unroll
      for (int k = 0; k < kUnit / 16; ++k) {
        const std::uint32_t a[4] = {probs[4 * k], probs[4 * k + 1], probs[4 * k + 2],
                                    probs[4 * k + 3]};
        std::uint32_t b[4];
        load_tiles_transposed(
            b, v + page_offset(k * 16 + tile % 2 * 8 + row, j * 16 + tile / 2 * 8, kDim));
        mma(acc[0], a, b[0], b[1]);
        mma(acc[1], a, b[2], b[3]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int half = i / 2 % 2;
        float& o = state.o[8 * j + i];
        o = fold_value(o, weight_state[half], acc[i / 4][i % 4], weight_unit[half]);
      }
    }
  }

  const SessionAttnParams& op_;
  const AttnTile& tile_;
  const AttnSpan& span_;
  const std::int32_t kv_head_, group_;
  const int warp_, lane_;
  unsigned char* const shared_;
  const std::int32_t* const table_;
  float* bias_;
  std::uint64_t* barriers_;
  std::int32_t offset_[2];    // token of the row, from the tile's first
  std::int32_t seen_end_[2];  // last visible key of the row, from the tile's pos
};

// The present units of a part's segments, in order.
struct UnitWalk {
  std::int32_t unit, segment;
  TML_HOST_DEVICE std::int32_t first_of(const AttnSpan& span) const {
    const std::int32_t begin = segment * kUnitsPerSegment;
    return begin > span.unit_begin ? begin : span.unit_begin;
  }
  TML_HOST_DEVICE std::int32_t last_of(const AttnSpan& span) const {
    const std::int32_t end = (segment + 1) * kUnitsPerSegment;
    return end < span.unit_end ? end : span.unit_end;
  }
  // To the next present unit at or after `unit`; false: none is left.
  TML_HOST_DEVICE bool settle(const AttnSpan& span, std::int32_t num_parts,
                              const std::int32_t* table) {
    while (segment < span.segment_end()) {
      for (; unit < last_of(span); ++unit)
        if (table[unit] >= 0) return true;
      segment += num_parts;
      unit = first_of(span);
    }
    return false;
  }
};

template <int kDim>
TML_KERNEL(kAttnThreads, 1)
session_attn_kernel(const TML_GRID_CONSTANT AttnParams p) {
  using Shared = AttnShared<kDim>;
  auto* const barriers = reinterpret_cast<std::uint64_t*>(shared_memory() + Shared::kBarriers);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 4; ++i) mbarrier_init(barriers + i, 1);
    mbarrier_init_fence();
  }
  grid_launch_dependents();
  grid_wait();
  const auto part = static_cast<std::int32_t>(blockIdx.x) % p.num_parts;
  const auto unit_of_work = static_cast<std::int32_t>(blockIdx.x) / p.num_parts;
  const std::int32_t kv_head = unit_of_work % p.op.kv.num_kv_heads;
  const std::int32_t tile_id = unit_of_work / p.op.kv.num_kv_heads;
  const AttnTile tile = attn_tile(p.op.batch, p.tokens_per_tile, tile_id);
  if (tile.num_tokens == 0) return;
  const AttnSpan span = span_of(p.op, tile);
  AttnBlock<kDim> block(p, tile, span, kv_head);
  const std::int32_t* const table =
      p.op.kv.table + p.op.batch.slots[tile.seq] * p.op.kv.table_row_stride;
  block.load_queries();
  __syncthreads();

  UnitWalk ahead{0, span.segment_begin() + part};
  ahead.unit = ahead.first_of(span);
  // Few queries read a page once; the tiles of a long step read it again and again.
  const std::uint64_t policy = p.num_parts > 1 ? evict_first() : evict_normal();
  int ahead_stage = 0;
  const auto load_next = [&] {  // one thread's
    if (!ahead.settle(span, p.num_parts, table)) return;
    block.load_page(ahead.unit++, ahead_stage, policy);
    ahead_stage ^= 1;
  };
  if (threadIdx.x == 0) {
    load_next();
    load_next();
  }
  auto* const total_o = reinterpret_cast<float*>(shared_memory() + Shared::kTotal);
  AttnState<kDim> state;
  float total_m[2] = {kMasked, kMasked}, total_l[2] = {0.0f, 0.0f};
  if (p.num_parts == 1)
    for (int i = 0; i < kDim / 2; ++i) total_o[i * kAttnThreads + threadIdx.x] = 0.0f;
  int stage = 0;
  std::uint32_t parity = 0;
  UnitWalk walk{0, span.segment_begin() + part};
  for (; walk.segment < span.segment_end(); walk.segment += p.num_parts) {
    state.clear();
    for (std::int32_t unit = walk.first_of(span); unit < walk.last_of(span); ++unit) {
      if (table[unit] < 0) continue;
      block.walk_unit(unit, stage, parity, state);
      __syncthreads();  // all have read this stage
      if (threadIdx.x == 0) load_next();
      stage ^= 1;
      parity ^= stage == 0 ? 1u : 0u;
    }
    if (p.num_parts == 1) {
      float wa[2], wb[2];
      fold_sums(total_m, total_l, state.m, state.l, wa, wb);
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) {
        float& o = total_o[i * kAttnThreads + threadIdx.x];
        o = fold_value(o, wa[i / 2 % 2], state.o[i], wb[i / 2 % 2]);
      }
    } else {
      float* const out =
          partial_of<kDim>(p, tile_id, kv_head, walk.segment - span.segment_begin()) + threadIdx.x;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        out[i * kAttnThreads] = state.m[i];
        out[(2 + i) * kAttnThreads] = state.l[i];
      }
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) out[(4 + i) * kAttnThreads] = state.o[i];
    }
  }
  if (p.num_parts > 1) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    state.m[i] = total_m[i];
    state.l[i] = total_l[i];
  }
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) state.o[i] = total_o[i * kAttnThreads + threadIdx.x];
  write_rows<kDim>(p.op, tile, kv_head, state);
}

// The left fold of a tile's segments, by threads that hold what the parts' threads held.
template <int kDim>
TML_KERNEL(kAttnThreads, 1)
session_attn_fold_kernel(const TML_GRID_CONSTANT AttnParams p) {
  grid_launch_dependents();
  grid_wait();
  const std::int32_t kv_head = static_cast<std::int32_t>(blockIdx.x) % p.op.kv.num_kv_heads;
  const std::int32_t tile_id = static_cast<std::int32_t>(blockIdx.x) / p.op.kv.num_kv_heads;
  const AttnTile tile = attn_tile(p.op.batch, p.tokens_per_tile, tile_id);
  if (tile.num_tokens == 0) return;
  const AttnSpan span = span_of(p.op, tile);
  AttnState<kDim> total;
  total.clear();
  for (std::int32_t segment = 0; segment < span.segment_end() - span.segment_begin(); ++segment) {
    const float* const part = partial_of<kDim>(p, tile_id, kv_head, segment) + threadIdx.x;
    float m[2], l[2], wa[2], wb[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      m[i] = part[i * kAttnThreads];
      l[i] = part[(2 + i) * kAttnThreads];
    }
    fold_sums(total.m, total.l, m, l, wa, wb);
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i)
      total.o[i] =
          fold_value(total.o[i], wa[i / 2 % 2], part[(4 + i) * kAttnThreads], wb[i / 2 % 2]);
  }
  write_rows<kDim>(p.op, tile, kv_head, total);
}

// num_parts 0: as many as fill the device.
AttnParams attn_plan(const SessionAttnParams& p, int num_sms, int num_parts, void* workspace,
                     std::size_t* num_bytes);
template <int kDim>
void session_attn_sized(const AttnParams& params, const Launch& launch);
extern template void session_attn_sized<64>(const AttnParams&, const Launch&);
extern template void session_attn_sized<128>(const AttnParams&, const Launch&);

}  // namespace tml::cuda
