// session_attn_bwd: a thread owns whole items (sequence, KV head), so that no sum crosses threads.
// It walks the item's units of 128 keys and, for each, the tiles of query rows that see it: scores
// and probabilities are recomputed in the cache and five products are taken from them.
#include "ops/session_attn_bwd.h"

#include "cpu/arena.h"
#include "cpu/cpu.h"
#include "cpu/panel_onto.h"
#include "cpu/parallel.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

constexpr int kKeys = contract::kPageLen;
constexpr int kKeyVecs = kKeys / 16;
constexpr int kRows = 64;  // query rows (tokens x heads of a group) of a tile
constexpr std::int64_t kUnitsPerBlock = contract::kGradBlock / contract::kPageLen;
// Below this many (token, key) pairs x head_dim a second thread costs more than it saves.
constexpr std::int64_t kMinParallelWork = 1 << 16;

struct BwdItem {
  std::int64_t seq, kv_head;
  float* dbank;  // [rel_dim][min(rel_len, tokens)]
};

// What all threads read, and the sums each of them owns a part of.
struct BwdShared {
  BwdItem* items;       // in ascending (sequence, KV head)
  std::int64_t* order;  // of the items: longest sequence first
  std::int64_t num_items;
  float* profile;  // [pad + rel_len + pad][rel_width] fp32, distances descending
  float* dq;       // [num_kv_heads][num_tokens * group][head_dim]
  float* dr;       // [num_kv_heads][num_tokens * group][rel_width]
  float* delta;    // [num_kv_heads][num_tokens * group]
  float* partials;
};

template <class T>
class AttnBwdWorker {
 public:
  static constexpr bool kIsBf16 = sizeof(T) == 2;

  AttnBwdWorker(const SessionAttnBwdParams& p, const BwdShared& shared)
      : p_(p),
        shared_(shared),
        dim_(p.head_dim),
        group_(p.num_heads / p.num_kv_heads),
        rel_width_(ceil_div(p.rel_dim, 16) * 16),
        bank_width_(p.rel_len + 2 * kRelPad),
        dim_steps_(num_k_steps(p.dtype, dim_)),
        tile_tokens_(kRows / group_) {
    Arena(Scratch::kThread)
        .take(&q_rows_, kRows * kOntoRow)
        .take(&do_rows_, kRows * kOntoRow)
        .take(&r_rows_, kRows * kOntoRow)
        .take(&q_columns_, kRows * dim_)
        .take(&do_columns_, kRows * dim_)
        .take(&r_values_, kRows * rel_width_)
        .take(&k_steps_, kKeys * dim_steps_)
        .take(&v_steps_, kKeys * dim_steps_)
        .take(&k_columns_, kKeys * dim_)
        .take(&s_, kRows * kOntoRow)
        .take(&dp_, kRows * kOntoRow)
        .take(&ds_rows_, kRows * kOntoRow)
        .take(&p_columns_, kRows * kKeys)
        .take(&ds_columns_, kRows * kKeys)
        .take(&sums_, 2 * kKeys * dim_)
        .take(&dbank_, 2 * p.rel_dim * bank_width_)
        .commit();
    dk_ = sums_;
    dv_ = sums_ + kKeys * dim_;
    dbank_sum_ = dbank_ + p.rel_dim * bank_width_;
  }

  void run(const BwdItem& item) {
    begin_ = p_.batch.cu_tokens[item.seq];
    count_ = p_.batch.cu_tokens[item.seq + 1] - begin_;
    head_ = item.kv_head;
    if (count_ == 0) return;
    const std::int64_t first_row = (head_ * p_.batch.num_tokens + begin_) * group_;
    dq_ = shared_.dq + first_row * dim_;
    dr_ = shared_.dr + first_row * rel_width_;
    delta_ = shared_.delta + first_row;
    clear(dq_, count_ * group_ * dim_);
    clear(dr_, count_ * group_ * rel_width_);
    clear(dbank_, 2 * p_.rel_dim * bank_width_);
    find_delta();
    const std::int64_t num_units = ceil_div(count_, kKeys);
    for (std::int64_t unit = 0; unit < num_units; ++unit) {
      walk_unit(unit * kKeys);
      if ((unit + 1) % kUnitsPerBlock == 0 || unit + 1 == num_units) promote_bank();
    }
    write_rows();
    write_bank(item);
  }

 private:
  static void clear(float* x, std::int64_t count) {
    std::memset(x, 0, static_cast<std::size_t>(count) * sizeof(float));
  }

  // Row of q, out and lse of a head of the group, for a token of the sequence.
  std::int64_t head_row(std::int64_t token, std::int64_t g) const {
    return (begin_ + token) * p_.num_heads + head_ * group_ + g;
  }
  const T* key_row(const void* x, std::int64_t key) const {
    return static_cast<const T*>(x) + ((begin_ + key) * p_.num_kv_heads + head_) * dim_;
  }

  void find_delta() const {
    for (std::int64_t token = 0; token < count_; ++token)
      for (std::int64_t g = 0; g < group_; ++g) {
        const T* o = static_cast<const T*>(p_.out) + head_row(token, g) * dim_;
        const T* d_out = static_cast<const T*>(p_.d_out) + head_row(token, g) * dim_;
        Vec sum = zero();
        for (std::int64_t d = 0; d < dim_; d += 16)
          sum = fma(load_as_f32(d_out + d), load_as_f32(o + d), sum);
        delta_[token * group_ + g] = hsum(sum);
      }
  }

  void walk_unit(std::int64_t base) {
    base_ = base;
    num_keys_ = std::min<std::int64_t>(kKeys, count_ - base);
    clear(sums_, 2 * kKeys * dim_);
    bool is_packed = false;
    for (tile_ = 0; tile_ < count_; tile_ += tile_tokens_) {
      num_tokens_ = std::min(tile_tokens_, count_ - tile_);
      if (!find_visible()) continue;
      if (!is_packed) pack_keys();
      is_packed = true;
      walk_tile();
    }
    for (std::int64_t key = 0; key < num_keys_; ++key) {
      const std::int64_t row = ((begin_ + base + key) * p_.num_kv_heads + head_) * dim_;
      write(static_cast<T*>(p_.dk) + row, dk_ + key * dim_, dim_, p_.scale);
      write(static_cast<T*>(p_.dv) + row, dv_ + key * dim_, dim_, 1.0f);
    }
  }

  // first_key_, last_key_ of each token of the tile in the unit; the vectors any of them sees.
  bool find_visible() {
    int first = kKeys, last = 0;
    for (std::int64_t t = 0; t < num_tokens_; ++t) {
      const std::int64_t pos = tile_ + t;
      const std::int64_t begin = p_.window > 0 ? pos - p_.window + 1 - base_ : 0;
      const std::int64_t end = p_.batch.visible_end[begin_ + pos] + 1 - base_;
      first_key_[t] = static_cast<int>(std::clamp<std::int64_t>(begin, 0, kKeys));
      last_key_[t] = static_cast<int>(std::clamp<std::int64_t>(end, 0, kKeys));
      if (first_key_[t] >= last_key_[t]) continue;
      first = std::min(first, first_key_[t]);
      last = std::max(last, last_key_[t]);
    }
    vec_ = first / 16;
    num_vecs_ = (last + 15) / 16 - vec_;
    return first < last;
  }

  // K and V as k-steps over d (for the scores), K also over keys (for dq); 0 past the sequence.
  void pack_keys() const {
    for (int key = 0; key < kKeys; ++key) {
      const bool is_key = key < num_keys_;
      const T* k = is_key ? key_row(p_.k, base_ + key) : nullptr;
      const T* v = is_key ? key_row(p_.v, base_ + key) : nullptr;
      for (std::int64_t i = 0; i < dim_steps_; ++i) {
        k_steps_[i * kKeys + key] = is_key ? k_step(k, i, dim_) : 0u;
        v_steps_[i * kKeys + key] = is_key ? k_step(v, i, dim_) : 0u;
      }
    }
    pack_step_rows<T>(
        k_columns_, dim_, kKeys, 0, dim_, static_cast<int>(dim_ / 16),
        [&](std::int64_t key) { return key < num_keys_ ? key_row(p_.k, base_ + key) : nullptr; });
  }

  void pack_tile() {
    const auto* q = static_cast<const T*>(p_.q);
    const auto* r = static_cast<const T*>(p_.r);
    const auto* d_out = static_cast<const T*>(p_.d_out);
    const std::int64_t rel_steps = num_k_steps(p_.dtype, p_.rel_dim);
    const auto row_bytes = static_cast<std::size_t>(dim_) * sizeof(T);
    const auto rel_bytes = static_cast<std::size_t>(p_.rel_dim) * sizeof(T);
    std::int64_t row = 0;
    for (std::int64_t t = 0; t < num_tokens_; ++t)
      for (std::int64_t g = 0; g < group_; ++g, ++row) {
        const std::int64_t source = head_row(tile_ + t, g);
        source_row_[row] = source;
        token_of_row_[row] = static_cast<int>(t);
        std::memcpy(q_rows_ + row * kOntoRow, q + source * dim_, row_bytes);
        std::memcpy(do_rows_ + row * kOntoRow, d_out + source * dim_, row_bytes);
        r_rows_[row * kOntoRow + rel_steps - 1] = 0;  // where an odd number of bf16 ends
        std::memcpy(r_rows_ + row * kOntoRow, r + source * p_.rel_dim, rel_bytes);
        for (std::int64_t c = 0; c < rel_width_; c += 16) {
          const auto count = static_cast<int>(std::min<std::int64_t>(16, p_.rel_dim - c));
          store(r_values_ + row * rel_width_ + c,
                load_first_as_f32(r + source * p_.rel_dim + c, count));
        }
      }
    const int vecs = static_cast<int>(dim_ / 16);
    pack_step_rows<T>(q_columns_, dim_, num_rows(), 0, dim_, vecs,
                      [&](std::int64_t i) { return q + source_row_[i] * dim_; });
    pack_step_rows<T>(do_columns_, dim_, num_rows(), 0, dim_, vecs,
                      [&](std::int64_t i) { return d_out + source_row_[i] * dim_; });
  }
  int num_rows() const { return static_cast<int>(num_tokens_ * group_); }

  // Everything one tile takes from one unit.
  void walk_tile() {
    pack_tile();
    const int rows = num_rows();
    const std::ptrdiff_t first = vec_ * 16;
    const std::int64_t keys = num_vecs_ * 16;
    const int dim_vecs = static_cast<int>(dim_ / 16);
    multiply_onto<kIsBf16, kOntoRow>(s_ + first, kOntoRow, k_steps_ + first, kKeys, num_vecs_,
                                     q_rows_, 1, rows, dim_steps_, Onto::kStore);
    multiply_onto<kIsBf16, kOntoRow>(dp_ + first, kOntoRow, v_steps_ + first, kKeys, num_vecs_,
                                     do_rows_, 1, rows, dim_steps_, Onto::kStore);
    differentiate();
    const std::int64_t row_steps = num_k_steps(p_.dtype, rows);
    multiply_onto<kIsBf16, 1>(dv_ + first * dim_, dim_, do_columns_, dim_, dim_vecs,
                              p_columns_ + first, kKeys, static_cast<int>(keys), row_steps,
                              Onto::kChain);
    multiply_onto<kIsBf16, 1>(dk_ + first * dim_, dim_, q_columns_, dim_, dim_vecs,
                              ds_columns_ + first, kKeys, static_cast<int>(keys), row_steps,
                              Onto::kChain);
    const std::int64_t step = num_k_steps(p_.dtype, first);
    multiply_onto<kIsBf16, kOntoRow>(dq_ + tile_ * group_ * dim_, dim_, k_columns_ + step * dim_,
                                     dim_, dim_vecs, ds_rows_ + step, 1, rows,
                                     num_k_steps(p_.dtype, keys), Onto::kChain);
    add_bias_gradients();
  }

  // bias of a token's heads, and where its distances start in the bank; -1: all of them are
  // outside.
  std::int64_t bank_offset(std::int64_t t) const {
    const std::int64_t distance = tile_ + t - base_;  // to the first key of the unit
    if (distance < 0 || distance >= p_.rel_len + kKeys - 1) return -1;
    return kRelPad + p_.rel_len - 1 - distance + vec_ * 16;
  }

  // s_ and dp_ become p and ds: as rows of x (dq), as k-steps over rows (dv, dk), and ds in fp32.
  void differentiate() {
    alignas(64) float bias[kRows * kKeys];
    const auto* bank = static_cast<const KStep*>(p_.rel_bank);
    for (std::int64_t t = 0; t < num_tokens_; ++t) {
      const std::int64_t offset = bank_offset(t);
      float* to = bias + t * group_ * kKeys + vec_ * 16;
      if (offset >= 0)
        multiply_onto<kIsBf16, kOntoRow>(
            to, kKeys, bank + offset, bank_width_, num_vecs_, r_rows_ + t * group_ * kOntoRow, 1,
            static_cast<int>(group_), num_k_steps(p_.dtype, p_.rel_dim), Onto::kStore);
      else
        for (std::int64_t g = 0; g < group_; ++g)
          for (int v = 0; v < num_vecs_; ++v) store(to + g * kKeys + v * 16, zero());
    }
    const Vec scale = set1(p_.scale);
    constexpr int kStepRows = kIsBf16 ? 1 : 2;  // k-steps of two rows
    for (int row = 0; row < num_rows(); row += 2) {
      const int count = std::min(2, num_rows() - row);
      Vec lse[2], delta[2];
      int first[2], last[2];
      for (int i = 0; i < count; ++i) {
        const int t = token_of_row_[row + i];
        lse[i] = set1(p_.lse[source_row_[row + i]]);
        delta[i] = set1(delta_[tile_ * group_ + row + i]);
        first[i] = first_key_[t];
        last[i] = last_key_[t];
      }
      KStep* p_steps = p_columns_ + row / 2 * kStepRows * kKeys;
      KStep* ds_steps = ds_columns_ + row / 2 * kStepRows * kKeys;
      for (int v = vec_; v < vec_ + num_vecs_; ++v) {
        Vec prob[2] = {zero(), zero()}, ds[2] = {zero(), zero()};
        for (int i = 0; i < count; ++i) {
          const std::int64_t at = (row + i) * kOntoRow + v * 16;
          const Vec s = fma(load(s_ + at), scale, load(bias + (row + i) * kKeys + v * 16));
          prob[i] = keep_range(exp(sub(s, lse[i])), first[i] - v * 16, last[i] - v * 16, zero());
          ds[i] = mul(prob[i], sub(load(dp_ + at), delta[i]));
          store(s_ + at, ds[i]);
          store_rounded(reinterpret_cast<T*>(ds_rows_ + (row + i) * kOntoRow) + v * 16, ds[i]);
        }
        if (kIsBf16 || count == 2) {
          store_step_rows(p_steps + v * 16, kKeys, prob[0], prob[1], T{});
          store_step_rows(ds_steps + v * 16, kKeys, ds[0], ds[1], T{});
        } else {
          store(reinterpret_cast<float*>(p_steps + v * 16), prob[0]);
          store(reinterpret_cast<float*>(ds_steps + v * 16), ds[0]);
        }
      }
    }
  }

  // dr += ds . bank and dbank += r . ds, token by token, at the token's own distances.
  void add_bias_gradients() {
    const int group = static_cast<int>(group_);
    for (std::int64_t t = 0; t < num_tokens_; ++t) {
      const std::int64_t offset = bank_offset(t);
      if (offset < 0 || first_key_[t] >= last_key_[t]) continue;
      const auto* ds = reinterpret_cast<const KStep*>(s_ + t * group_ * kOntoRow + vec_ * 16);
      multiply_onto<false, kOntoRow>(
          dr_ + (tile_ + t) * group_ * rel_width_, rel_width_,
          reinterpret_cast<const KStep*>(shared_.profile + offset * rel_width_), rel_width_,
          static_cast<int>(rel_width_ / 16), ds, 1, group, num_vecs_ * 16, Onto::kChain);
      multiply_onto<false, 1>(dbank_ + offset, bank_width_, ds, kOntoRow, num_vecs_,
                              reinterpret_cast<const KStep*>(r_values_) + t * group_ * rel_width_,
                              rel_width_, p_.rel_dim, group, Onto::kChain);
    }
  }

  void promote_bank() const {
    for (std::int64_t i = 0; i < p_.rel_dim * bank_width_; ++i) {
      dbank_sum_[i] = dbank_sum_[i] + dbank_[i];
      dbank_[i] = 0.0f;
    }
  }

  static void write(T* out, const float* from, std::int64_t count, float scale) {
    for (std::int64_t i = 0; i < count; i += 16)
      store_rounded(out + i, mul(load(from + i), set1(scale)));
  }
  void write_rows() const {
    for (std::int64_t token = 0; token < count_; ++token)
      for (std::int64_t g = 0; g < group_; ++g) {
        const std::int64_t row = token * group_ + g, target = head_row(token, g);
        write(static_cast<T*>(p_.dq) + target * dim_, dq_ + row * dim_, dim_, p_.scale);
        T* dr = static_cast<T*>(p_.dr) + target * p_.rel_dim;
        for (std::int64_t c = 0; c < p_.rel_dim; ++c) dr[c] = rounded<T>(dr_[row * rel_width_ + c]);
      }
  }
  // The distances this sequence has, ascending.
  void write_bank(const BwdItem& item) const {
    const std::int64_t num_distances = std::min(p_.rel_len, count_);
    for (std::int64_t c = 0; c < p_.rel_dim; ++c)
      for (std::int64_t d = 0; d < num_distances; ++d)
        item.dbank[c * num_distances + d] =
            dbank_sum_[c * bank_width_ + kRelPad + p_.rel_len - 1 - d];
  }

  const SessionAttnBwdParams& p_;
  const BwdShared& shared_;
  const std::int64_t dim_, group_, rel_width_, bank_width_, dim_steps_, tile_tokens_;
  KStep *q_rows_, *do_rows_, *r_rows_, *q_columns_, *do_columns_;
  KStep *k_steps_, *v_steps_, *k_columns_, *ds_rows_, *p_columns_, *ds_columns_;
  float *r_values_, *s_, *dp_, *sums_, *dk_, *dv_, *dbank_, *dbank_sum_;
  float *dq_ = nullptr, *dr_ = nullptr, *delta_ = nullptr;  // of the item
  std::int64_t begin_ = 0, count_ = 0, head_ = 0;
  std::int64_t base_ = 0, num_keys_ = 0, tile_ = 0, num_tokens_ = 0;
  int vec_ = 0, num_vecs_ = 0;
  int first_key_[kRows], last_key_[kRows];  // of each token of the tile
  std::int64_t source_row_[kRows];          // of each query row: its row in q, out and lse
  int token_of_row_[kRows];
};

// The items, and the bank as fp32 rows of distances.
template <class T>
BwdShared prepare(const SessionAttnBwdParams& p) {
  BwdShared shared{};
  const std::int64_t width = ceil_div(p.rel_dim, 16) * 16, bank_width = p.rel_len + 2 * kRelPad;
  const std::int64_t rows = p.batch.num_tokens * p.num_heads;
  shared.num_items = static_cast<std::int64_t>(p.batch.num_seqs) * p.num_kv_heads;
  std::int64_t num_partials = 0;
  const auto count = [&](std::int64_t s) {
    return p.batch.cu_tokens[s + 1] - p.batch.cu_tokens[s];
  };
  for (std::int64_t s = 0; s < p.batch.num_seqs; ++s)
    num_partials += p.num_kv_heads * p.rel_dim * std::min<std::int64_t>(p.rel_len, count(s));
  Arena(Scratch::kOp)
      .take(&shared.items, shared.num_items)
      .take(&shared.order, shared.num_items)
      .take(&shared.profile, bank_width * width)
      .take(&shared.dq, rows * p.head_dim)
      .take(&shared.dr, rows * width)
      .take(&shared.delta, rows)
      .take(&shared.partials, num_partials)
      .commit();
  float* partial = shared.partials;
  for (std::int64_t i = 0; i < shared.num_items; ++i) {
    const std::int64_t s = i / p.num_kv_heads;
    shared.items[i] = {s, i % p.num_kv_heads, partial};
    partial += p.rel_dim * std::min<std::int64_t>(p.rel_len, count(s));
    // Insertion keeps the order of equals; there are few sequences.
    std::int64_t at = i;
    for (; at > 0 && count(shared.items[shared.order[at - 1]].seq) < count(s); --at)
      shared.order[at] = shared.order[at - 1];
    shared.order[at] = i;
  }
  constexpr std::int64_t kInStep = 4 / sizeof(T);
  const auto* bank = static_cast<const T*>(p.rel_bank);
  for (std::int64_t at = 0; at < bank_width; ++at)
    for (std::int64_t c = 0; c < width; ++c)
      shared.profile[at * width + c] =
          c < p.rel_dim ? to_f32(bank[(c / kInStep * bank_width + at) * kInStep + c % kInStep])
                        : 0.0f;
  return shared;
}

// dbank of one bias channel: sequences, then KV heads, in ascending order.
void fold_bank(const SessionAttnBwdParams& p, const BwdShared& shared, std::int64_t channel) {
  float* out = p.dbank + channel * p.rel_len;
  std::memset(out, 0, static_cast<std::size_t>(p.rel_len) * sizeof(float));
  for (std::int64_t i = 0; i < shared.num_items; ++i) {
    const BwdItem& item = shared.items[i];
    const std::int64_t count = std::min<std::int64_t>(
        p.rel_len, p.batch.cu_tokens[item.seq + 1] - p.batch.cu_tokens[item.seq]);
    const float* from = item.dbank + channel * count;
    for (std::int64_t d = 0; d < count; ++d) out[d] = out[d] + from[d];
  }
}

template <class T>
void session_attn_bwd_typed(const SessionAttnBwdParams& p) {
  const BwdShared shared = prepare<T>(p);
  std::int64_t work = 0;
  for (std::int64_t s = 0; s < p.batch.num_seqs; ++s) {
    const std::int64_t count = p.batch.cu_tokens[s + 1] - p.batch.cu_tokens[s];
    work += count * count * p.num_heads * p.head_dim;
  }
  std::int64_t next = 0;  // longest first, whoever is free takes the next
  parallel(work < kMinParallelWork ? 1 : p.num_threads, [&](int thread, int num_threads) {
    AttnBwdWorker<T> worker(p, shared);
    for (std::int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < shared.num_items;)
      worker.run(shared.items[shared.order[i]]);
    team_barrier();
    const Range channels = split(p.rel_dim, thread, num_threads);
    for (std::int64_t c = channels.begin; c < channels.end; ++c) fold_bank(p, shared, c);
  });
}

}  // namespace

void session_attn_bwd(const SessionAttnBwdParams& p) {
  if (p.dtype == DType::kF32) return TML_F32(session_attn_bwd, session_attn_bwd_typed<float>)(p);
  session_attn_bwd_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
