// lm_head: logits by linear into the workspace, then a warp owns a vocabulary block of a row (lane
// l the entries l, l + 32, l + 64, l + 96: the halving of the contract), then a block owns a row.
// Draws are functions of seed, position and id, so a row's token does not depend on its batch. A
// row with top_k or top_p is then decided by a block of its own, which takes its ids in descending
// order, kChunk at a time: the chunk's last key is found digit by digit, the chunk sorted in shared
// memory.
#include "core/philox.h"
#include "cuda/cuda.h"
#include "cuda/linear.h"
#include "cuda/row.h"
#include "cuda/vocab.h"

namespace tml::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kVocabBlock = contract::kVocabBlock;
constexpr float kLowest = -3.40282347e+38f;

struct Best {
  float score, logit;
  std::int32_t id;  // -1: nothing allowed
};
struct BlockSum {
  float max, sum;
};

struct VocabParams {
  const float* logits;  // [num_rows, vocab_size]
  BlockSum* sums;       // [num_rows, num_blocks]
  Best* bests;
  std::int64_t num_rows, vocab_size;
  std::int32_t num_blocks;
  // Log-probabilities of targets, or null: sample.
  const std::int64_t* targets;
  LmHeadSampleParams sample;
  float* logprobs;
  float* lse;  // [num_rows]
};

TML_DEVICE float minus_infinity() { return bits_to_float(0xff800000u); }

// -log(-log u), u = (bits + 1/2) / 2^32; the upper half through 1 - u keeps full relative
// precision.
TML_DEVICE float gumbel_of(std::uint32_t bits) {
  const bool is_upper = bits >= 0x80000000u;
  const auto from_end = static_cast<std::int32_t>(is_upper ? ~bits : bits);
  const float near = __fmul_rn(__fadd_rn(static_cast<float>(from_end), 0.5f), 0x1p-32f);
  const float u = is_upper ? __fadd_rn(1.0f, -near) : near;
  const float log_u = log_poly(u);
  const float corrected =
      u == 1.0f ? -near : __fmul_rn(log_u, __fdiv_rn(near, __fadd_rn(1.0f, -u)));
  return -log_poly(-(is_upper ? corrected : log_u));
}

TML_DEVICE bool is_better(const Best& a, const Best& b) {
  if (b.id < 0) return a.id >= 0;
  return a.id >= 0 && (a.score > b.score || (a.score == b.score && a.id < b.id));
}
TML_DEVICE Best best_of_warp(Best best) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const Best other{__shfl_xor_sync(kFullMask, best.score, mask),
                     __shfl_xor_sync(kFullMask, best.logit, mask),
                     __shfl_xor_sync(kFullMask, best.id, mask)};
    if (is_better(other, best)) best = other;
  }
  return best;
}

TML_DEVICE float score_of(const LmHeadSampleParams& s, std::int64_t row, std::int64_t id,
                          float logit) {
  const float temperature = s.temperature[row];
  if (temperature == 0.0f) return logit;
  const auto index = static_cast<std::uint32_t>(id);
  const PhiloxCounter words = philox4x32(
      philox_counter(PhiloxStream::kVocabulary, s.position[row], index), philox_key(s.seed[row]));
  const std::uint32_t word = index % 4 == 0   ? words.word[0]
                             : index % 4 == 1 ? words.word[1]
                             : index % 4 == 2 ? words.word[2]
                                              : words.word[3];
  return __fmaf_rn(logit, __fdiv_rn(1.0f, temperature), gumbel_of(word));
}

TML_KERNEL(kThreads, 4) vocab_block_kernel(const TML_GRID_CONSTANT VocabParams p) {
  grid_launch_dependents();
  grid_wait();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t work = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (work >= p.num_rows * p.num_blocks) return;
  const std::int64_t row = work / p.num_blocks, first = work % p.num_blocks * kVocabBlock;
  float x[4], e[4], top = kLowest;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::int64_t id = first + i * 32 + lane;
    x[i] = id < p.vocab_size ? p.logits[row * p.vocab_size + id] : minus_infinity();
    top = x[i] > top ? x[i] : top;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = __shfl_xor_sync(kFullMask, top, mask);
    top = other > top ? other : top;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) e[i] = exp_poly(__fadd_rn(x[i], -top));
  const float sum = warp_sum(__fadd_rn(__fadd_rn(e[0], e[2]), __fadd_rn(e[1], e[3])));
  if (lane == 0) p.sums[work] = {top, sum};
  if (p.targets != nullptr) return;

  Best best{minus_infinity(), 0.0f, -1};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::int64_t id = first + i * 32 + lane;
    if (id >= p.vocab_size) continue;
    if (p.sample.allowed != nullptr) {
      const std::int32_t bits = p.sample.allowed[row * ((p.vocab_size + 31) / 32) + id / 32];
      if ((static_cast<std::uint32_t>(bits) >> (id % 32) & 1u) == 0) continue;
    }
    // NaN stands behind every number, as -inf does; among those the first id is taken.
    const float score = score_of(p.sample, row, id, x[i]);
    const Best candidate{score == score ? score : minus_infinity(), x[i],
                         static_cast<std::int32_t>(id)};
    if (is_better(candidate, best)) best = candidate;
  }
  best = best_of_warp(best);
  if (lane == 0) p.bests[work] = best;
}

TML_KERNEL(kThreads, 4) vocab_fold_kernel(const TML_GRID_CONSTANT VocabParams p) {
  grid_launch_dependents();
  grid_wait();
  auto* const shared = reinterpret_cast<float*>(shared_memory());
  auto* const bests = reinterpret_cast<Best*>(shared + 2 * kWarps);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const std::int64_t row = blockIdx.x;
  const BlockSum* const sums = p.sums + row * p.num_blocks;
  float top = kLowest;
  Best best{minus_infinity(), 0.0f, -1};
  for (std::int32_t b = static_cast<std::int32_t>(threadIdx.x); b < p.num_blocks; b += kThreads) {
    top = sums[b].max > top ? sums[b].max : top;
    if (p.targets != nullptr) continue;
    const Best candidate = p.bests[row * p.num_blocks + b];
    if (is_better(candidate, best)) best = candidate;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = __shfl_xor_sync(kFullMask, top, mask);
    top = other > top ? other : top;
  }
  best = best_of_warp(best);
  if (lane == 0) {
    shared[kWarps + warp] = top;
    bests[warp] = best;
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    const float other = shared[kWarps + w];
    top = other > top ? other : top;
    if (is_better(bests[w], best)) best = bests[w];
  }
  float sum = 0.0f;
  for (std::int32_t b = static_cast<std::int32_t>(threadIdx.x); b < p.num_blocks; b += kThreads)
    sum = __fmaf_rn(sums[b].sum, exp_poly(__fadd_rn(sums[b].max, -top)), sum);
  sum = row_sum(sum, shared);
  if (threadIdx.x != 0) return;
  const float lse = sum == sum ? __fadd_rn(top, log_poly(sum)) : sum;
  p.lse[row] = lse;
  if (p.targets != nullptr) {
    p.logprobs[row] = __fadd_rn(p.logits[row * p.vocab_size + p.targets[row]], -lse);
    return;
  }
  p.sample.tokens[row] = best.id;
  p.logprobs[row] = __fadd_rn(best.logit, -lse);
}

// ---- top_k and top_p ----

constexpr int kFilterThreads = 512;
constexpr int kChunk = 1024;

struct FilterShared {
  std::uint64_t keys[kChunk];
  double sums[kFilterThreads];
  float tops[kFilterThreads];
  int counts[256];
  int digit, left, num_keys;
};

// The ids of a row that may be drawn, as keys: larger is the higher logit, then the lower id.
struct FilterRow {
  const float* logits;
  const std::int32_t* allowed;  // of the row, or null
  std::int64_t vocab_size;
  float top, scale;

  TML_DEVICE bool is_allowed(std::int64_t id) const {
    return allowed == nullptr ||
           (static_cast<std::uint32_t>(allowed[id / 32]) >> (id % 32) & 1u) != 0;
  }
  TML_DEVICE float weight(float logit) const {
    return exp_poly(__fmul_rn(__fadd_rn(logit, -top), scale));
  }
  // 0: not among them.
  TML_DEVICE std::uint64_t key(std::int64_t id) const {
    const float logit = logits[id];
    if (!is_allowed(id) || !(weight(logit) > 0.0f)) return 0;
    const std::uint32_t bits = float_to_bits(__fadd_rn(logit, 0.0f));  // -0 is +0
    const std::uint32_t ordered = bits ^ ((bits >> 31) != 0 ? ~0u : 0x80000000u);
    return static_cast<std::uint64_t>(ordered) << 32 | static_cast<std::uint32_t>(~id);
  }
  static TML_DEVICE std::int64_t id_of(std::uint64_t key) {
    return static_cast<std::int64_t>(~static_cast<std::uint32_t>(key));
  }
};

// shared.keys[0, num_keys) = the largest keys below `bound`, up to kChunk, descending.
TML_DEVICE void take_chunk(const FilterRow& row, std::uint64_t bound, FilterShared& shared) {
  const auto thread = static_cast<int>(threadIdx.x);
  // The kChunk-th largest, from its highest digit on; 0 if there are fewer.
  std::uint64_t prefix = 0;
  int left = kChunk;
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int i = thread; i < 256; i += kFilterThreads) shared.counts[i] = 0;
    __syncthreads();
    for (std::int64_t id = thread; id < row.vocab_size; id += kFilterThreads) {
      const std::uint64_t key = row.key(id);
      if (key == 0 || key >= bound) continue;
      if (shift < 56 && key >> (shift + 8) != prefix >> (shift + 8)) continue;
      atomicAdd(shared.counts + static_cast<int>(key >> shift & 0xffu), 1);
    }
    __syncthreads();
    if (thread == 0) {
      int digit = 255;
      while (digit > 0 && shared.counts[digit] < left) left -= shared.counts[digit--];
      shared.digit = digit;
      shared.left = left;
    }
    __syncthreads();
    prefix |= static_cast<std::uint64_t>(shared.digit) << shift;
    left = shared.left;
  }
  for (int i = thread; i < kChunk; i += kFilterThreads) shared.keys[i] = 0;
  if (thread == 0) shared.num_keys = 0;
  __syncthreads();
  for (std::int64_t id = thread; id < row.vocab_size; id += kFilterThreads) {
    const std::uint64_t key = row.key(id);
    if (key != 0 && key < bound && key >= prefix) shared.keys[atomicAdd(&shared.num_keys, 1)] = key;
  }
  __syncthreads();
  for (int size = 2; size <= kChunk; size *= 2)  // bitonic, descending
    for (int step = size / 2; step > 0; step /= 2) {
      for (int i = thread; i < kChunk; i += kFilterThreads) {
        const int other = i ^ step;
        if (other < i) continue;
        const std::uint64_t a = shared.keys[i], b = shared.keys[other];
        if ((a < b) == ((i & size) == 0)) {
          shared.keys[i] = b;
          shared.keys[other] = a;
        }
      }
      __syncthreads();
    }
}

TML_KERNEL(kFilterThreads, 1) vocab_filter_kernel(const TML_GRID_CONSTANT VocabParams p) {
  grid_launch_dependents();
  grid_wait();
  auto& shared = *reinterpret_cast<FilterShared*>(shared_memory());
  const std::int64_t at = blockIdx.x;
  const LmHeadSampleParams& s = p.sample;
  const std::int32_t top_k = s.top_k == nullptr ? 0 : s.top_k[at];
  const float top_p = s.top_p == nullptr ? 1.0f : s.top_p[at];
  const float temperature = s.temperature[at];
  if (!(temperature > 0.0f) || (top_k <= 0 && !(top_p < 1.0f))) return;
  const auto thread = static_cast<int>(threadIdx.x);
  FilterRow row{p.logits + at * p.vocab_size,
                s.allowed == nullptr ? nullptr : s.allowed + at * ((p.vocab_size + 31) / 32),
                p.vocab_size, minus_infinity(), __fdiv_rn(1.0f, temperature)};
  float top = minus_infinity();
  for (std::int64_t id = thread; id < p.vocab_size; id += kFilterThreads)
    if (row.is_allowed(id) && row.logits[id] > top) top = row.logits[id];
  shared.tops[thread] = top;
  __syncthreads();
  for (int i = 0; i < kFilterThreads; ++i) top = shared.tops[i] > top ? shared.tops[i] : top;
  row.top = top > -kLowest ? -kLowest : top;  // an infinite logit keeps a weight, its own

  double total = 0.0;
  if (top_k <= 0) {
    for (std::int64_t id = thread; id < p.vocab_size; id += kFilterThreads)
      if (row.key(id) != 0) total += static_cast<double>(row.weight(row.logits[id]));
    shared.sums[thread] = total;
    __syncthreads();
    for (int step = kFilterThreads / 2; step > 0; step /= 2) {
      if (thread < step) shared.sums[thread] += shared.sums[thread + step];
      __syncthreads();
    }
    total = shared.sums[0];
  }
  const auto limit = static_cast<std::int64_t>(top_k > 0 ? top_k : p.vocab_size);
  // With top_k the total is that of the first top_k: a walk to add, then one to choose.
  Best best{minus_infinity(), 0.0f, -1};
  for (int walk = top_k > 0 ? 0 : 1; walk < 2; ++walk) {
    const double needed = static_cast<double>(top_p) * total;
    double reached = 0.0;
    std::uint64_t bound = ~std::uint64_t{0};
    bool is_done = false;
    for (std::int64_t taken = 0; taken < limit && !is_done;) {
      take_chunk(row, bound, shared);
      const int count = shared.num_keys;
      // Every thread walks the chunk: no one has to tell the others.
      for (int i = 0; i < count && taken < limit && !is_done; ++i, ++taken) {
        const std::int64_t id = FilterRow::id_of(shared.keys[i]);
        const float logit = row.logits[id];
        reached += static_cast<double>(row.weight(logit));
        if (walk == 0) continue;
        const Best candidate{score_of(s, at, id, logit), logit, static_cast<std::int32_t>(id)};
        if (is_better(candidate, best)) best = candidate;
        is_done = top_p < 1.0f && reached >= needed;
      }
      if (count < kChunk) break;
      bound = shared.keys[kChunk - 1];
      __syncthreads();  // all have read the chunk
    }
    if (walk == 0) total = reached;
    __syncthreads();
  }
  if (thread != 0 || best.id < 0) return;  // without a number the fold's choice stands
  s.tokens[at] = best.id;
  p.logprobs[at] = __fadd_rn(best.logit, -p.lse[at]);
}

struct VocabWorkspace {
  float* lse;
  float* logits;
  BlockSum* sums;
  Best* bests;
  std::size_t num_bytes;

  VocabWorkspace(const LmHeadInput& in, void* base) {
    Workspace parts(base);
    const std::int64_t blocks = in.num_tokens * ((in.vocab_size + kVocabBlock - 1) / kVocabBlock);
    lse = parts.take<float>(in.num_tokens);
    logits = parts.take<float>(in.num_tokens * in.vocab_size);
    sums = parts.take<BlockSum>(blocks);
    bests = parts.take<Best>(blocks);
    num_bytes = parts.used();
  }
};

void run(const char* op, const LmHeadInput& in, bool is_static, VocabParams p,
         const Launch& launch) {
  const VocabWorkspace work(in, launch.workspace);
  check_workspace(op, launch, work.num_bytes);
  const LinearParams product{in.h,
                             in.weight,
                             work.logits,
                             in.h_row_stride,
                             in.vocab_size,
                             in.num_tokens,
                             in.in_dim,
                             in.vocab_size,
                             DType::kBf16,
                             DType::kF32,
                             0};
  if (is_static)
    linear(product, launch);
  else
    linear_of_fresh(product, launch);
  p.logits = work.logits;
  p.sums = work.sums;
  p.lse = work.lse;
  p.bests = work.bests;
  p.num_rows = in.num_tokens;
  p.vocab_size = in.vocab_size;
  p.num_blocks = static_cast<std::int32_t>((in.vocab_size + kVocabBlock - 1) / kVocabBlock);
  const std::int64_t warps = p.num_rows * p.num_blocks;
  launch_kernel(op, launch, vocab_block_kernel,
                static_cast<unsigned>((warps + kWarps - 1) / kWarps), kThreads, 0, p);
  launch_kernel(op, launch, vocab_fold_kernel, static_cast<unsigned>(p.num_rows), kThreads,
                2 * kWarps * sizeof(float) + kWarps * sizeof(Best), p);
  if (p.sample.top_k != nullptr || p.sample.top_p != nullptr)
    launch_kernel(op, launch, vocab_filter_kernel, static_cast<unsigned>(p.num_rows),
                  kFilterThreads, sizeof(FilterShared), p);
}

}  // namespace

std::size_t lm_head_workspace_bytes(const LmHeadInput& input) {
  return VocabWorkspace(input, nullptr).num_bytes;
}

void lm_head_logprobs(const LmHeadLogprobsParams& p, const Launch& launch) {
  if (p.input.num_tokens == 0) return;
  VocabParams params{};
  params.targets = p.targets;
  params.logprobs = p.logprobs;
  run("lm_head_logprobs", p.input, true, params, launch);
}

VocabRows vocab_logprobs(const char* op, const LmHeadLogprobsParams& p, const Launch& launch) {
  VocabParams params{};
  params.targets = p.targets;
  params.logprobs = p.logprobs;
  run(op, p.input, false, params, launch);
  const VocabWorkspace work(p.input, launch.workspace);
  return {work.logits, work.lse};
}

void lm_head_sample(const LmHeadSampleParams& p, const Launch& launch) {
  if (p.input.num_tokens == 0) return;
  VocabParams params{};
  params.sample = p;
  params.logprobs = p.logprobs;
  run("lm_head_sample", p.input, true, params, launch);
}

}  // namespace tml::cuda
