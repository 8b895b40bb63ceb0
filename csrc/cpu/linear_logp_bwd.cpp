// linear_logp_bwd: for as many tokens as there is room for, the logits by linear_logp's walk, which
// are kept; then the vocabulary in runs of 512 entries: dl of the run in the cache, from which dh
// (split by columns of h) and dw (split by entries) take their products. Each sum belongs to one
// thread.
#include "cpu/arena.h"
#include "cpu/cpu.h"
#include "cpu/panel_onto.h"
#include "cpu/parallel.h"
#include "cpu/vocab_blocks.h"
#include "ops/linear_logp.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

constexpr std::int64_t kPanel = contract::kPanel;
constexpr std::int64_t kEntries = 512;  // of the vocabulary, at a time: moves work, never a bit
constexpr std::int64_t kRowGap = 32;    // so that rows of logits start in different cache sets
// Below this many products a second thread costs more than it saves.
constexpr std::int64_t kMinParallelWork = 1 << 17;

template <class T>
class LogpBwd {
 public:
  explicit LogpBwd(const LinearLogpBwdParams& p)
      : p_(p),
        in_(p.input),
        in_steps_(num_k_steps(in_.dtype, in_.in_dim)),
        in_panels_(ceil_div(in_.in_dim, kPanel)),
        width_(in_panels_ * kPanel),
        num_blocks_(ceil_div(in_.vocab_size, kVocabBlock)),
        logit_stride_(num_blocks_ * kVocabBlock + kRowGap),
        chain_(logp_block(in_.vocab_size)) {
    const std::int64_t most = std::max(chain_, kLogitRoom / in_.vocab_size / chain_ * chain_);
    room_ = std::min(in_.num_tokens, most);
    const std::int64_t runs = ceil_div(in_.vocab_size, kEntries);
    const std::int64_t entries = std::min(kEntries, ceil_div(in_.vocab_size, kPanel) * kPanel);
    entry_room_ = num_k_steps(in_.dtype, entries);
    chain_room_ = num_k_steps(in_.dtype, chain_);
    const std::int64_t has_entropy = p.d_entropy != nullptr;
    Arena(Scratch::kOp)
        .take(&logits_, room_ * logit_stride_)
        .take(&sums_, room_ * num_blocks_)
        .take(&moments_, has_entropy * room_ * num_blocks_)
        .take(&lse_, room_)
        .take(&entropy_, has_entropy * room_)
        .take(&h_rows_, room_ * in_steps_ + 16)
        .take(&h_columns_, ceil_div(room_, chain_) * block_columns())
        .take(&w_columns_, runs * run_columns())
        .take(&dh_, room_ * width_)
        .take(&dw_, (is_one_pass() ? kEntries : runs * kEntries) * width_)
        .take(&dl_, 2 * chain_ * kEntries)
        .take(&dl_tokens_, 2 * chain_ * entry_room_)
        .take(&dl_entries_, kEntries * chain_room_)
        .commit();
  }

  void run(int thread, int num_threads) {
    thread_ = thread;
    num_threads_ = num_threads;
    pack_entries();
    for (begin_ = 0; begin_ < in_.num_tokens; begin_ += room_) {
      num_rows_ = std::min(room_, in_.num_tokens - begin_);
      compute_logits();
      pack_tokens();
      fold_rows();
      barrier();
      for (first_ = 0; first_ < in_.vocab_size; first_ += kEntries) {
        entries_ = std::min(kEntries, in_.vocab_size - first_);
        for (std::int64_t row = 0; row < num_rows_; row += chain_) {
          const std::int64_t count = std::min(chain_, num_rows_ - row);
          // One of two, so that nobody waits for readers of the one before.
          buffer_ ^= 1;
          differentiate(row, count);
          barrier();
          add_dh(row, count);
          add_dw(row, count);
        }
        if (begin_ + num_rows_ == in_.num_tokens) write_dw();
      }
      write_dh();
    }
  }

 private:
  void barrier() const {
    if (num_threads_ > 1) {
      team_barrier();
    }
  }
  bool is_one_pass() const { return room_ == in_.num_tokens; }
  std::int64_t block_columns() const { return in_panels_ * chain_room_ * kPanel; }
  std::int64_t run_columns() const { return in_panels_ * entry_room_ * kPanel; }
  const T* h(std::int64_t row) const {
    return static_cast<const T*>(in_.h) + (begin_ + row) * in_.h_row_stride;
  }
  const float* logits(std::int64_t row) const { return logits_ + row * logit_stride_; }
  T* dl() const { return dl_ + buffer_ * chain_ * kEntries; }
  KStep* dl_tokens() const { return dl_tokens_ + buffer_ * chain_ * entry_room_; }
  float* dw() const { return dw_ + (is_one_pass() ? 0 : first_ * width_); }

  // The plain weights as weights over entries (for dh), run by run.
  void pack_entries() const {
    const std::int64_t runs = ceil_div(in_.vocab_size, kEntries);
    const Range own = split(runs * in_panels_, thread_, num_threads_);
    for (std::int64_t i = own.begin; i < own.end; ++i) {
      const std::int64_t first = i / in_panels_ * kEntries, panel = i % in_panels_;
      const std::int64_t count = std::min(kEntries, in_.vocab_size - first);
      const T* w = static_cast<const T*>(p_.weight) + first * p_.weight_row_stride;
      pack_step_rows<T>(w_columns_ + i / in_panels_ * run_columns() +
                            panel * num_k_steps(in_.dtype, count) * kPanel,
                        kPanel, count, panel * kPanel, in_.in_dim, 2,
                        [&](std::int64_t entry) { return w + entry * p_.weight_row_stride; });
    }
  }

  void compute_logits() const {
    LmHeadInput rows = in_;
    rows.h = h(0);
    rows.num_tokens = num_rows_;
    const VocabBlocks<T> vocab(rows);
    vocab.pack(h_rows_, thread_, num_threads_);
    barrier();
    vocab.for_each(h_rows_, split(num_blocks_, thread_, num_threads_),
                   [&](std::int64_t row, std::int64_t block, const float* found) {
                     std::memcpy(logits_ + row * logit_stride_ + block * kVocabBlock, found,
                                 kVocabBlock * sizeof(float));
                     const BlockSum sum = block_sum(found);
                     sums_[row * num_blocks_ + block] = sum;
                     if (p_.d_entropy != nullptr)
                       moments_[row * num_blocks_ + block] = block_moment(found, sum.max);
                   });
  }

  // h as weights over tokens (for dw).
  void pack_tokens() const {
    const Range panels = split(in_panels_, thread_, num_threads_);
    for (std::int64_t row = 0; row < num_rows_; row += chain_) {
      const std::int64_t count = std::min(chain_, num_rows_ - row);
      KStep* block = h_columns_ + row / chain_ * block_columns();
      for (std::int64_t panel = panels.begin; panel < panels.end; ++panel)
        pack_step_rows<T>(block + panel * num_k_steps(in_.dtype, count) * kPanel, kPanel, count,
                          panel * kPanel, in_.in_dim, 2,
                          [&](std::int64_t i) { return h(row + i); });
    }
    barrier();
  }

  void fold_rows() const {
    const Range rows = split(num_rows_, thread_, num_threads_);
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      const BlockSum* blocks = sums_ + row * num_blocks_;
      lse_[row] = log_sum_exp(blocks, num_blocks_);
      p_.logprobs[begin_ + row] = logits(row)[p_.targets[begin_ + row]] - lse_[row];
      if (p_.d_entropy != nullptr)
        entropy_[row] = entropy_of(blocks, moments_ + row * num_blocks_, num_blocks_);
    }
  }

  // dl of this thread's tiles of tokens, then the same as rows of x (for dh).
  void differentiate(std::int64_t first_row, std::int64_t count) const {
    const TileSplit tiles(count);
    const Range own = split(tiles.count, thread_, num_threads_);
    const std::int64_t steps = num_k_steps(in_.dtype, entries_);
    for (std::int64_t tile = own.begin; tile < own.end; ++tile) {
      const std::int64_t begin = tiles.begin(tile);
      for (int m = 0; m < tiles.rows(tile); ++m)
        differentiate_row(first_row + begin + m, dl() + (begin + m) * kEntries);
      pack_rows<T>(dl_tokens() + begin * steps, tiles.rows(tile), entries_,
                   [&](int m) { return dl() + (begin + m) * kEntries; });
    }
  }

  // What is past the vocabulary's end is never read.
  void differentiate_row(std::int64_t row, T* dl) const {
    const float g = p_.d_logprobs[begin_ + row];
    const Vec lse = set1(lse_[row]), minus_g = set1(-g);
    const bool has_entropy = p_.d_entropy != nullptr;
    const Vec entropy = set1(has_entropy ? entropy_[row] : 0.0f);
    const Vec minus_ge = set1(has_entropy ? -p_.d_entropy[begin_ + row] : 0.0f);
    const std::int64_t target = p_.targets[begin_ + row] - first_;
    const float* found = logits(row) + first_;
    for (std::int64_t n = 0; n < entries_; n += 16) {
      const Vec logp = sub(load(found + n), lse);
      const Vec prob = exp(logp);
      Vec value = mul(minus_g, prob);
      if (target >= n && target < n + 16) {
        alignas(64) float probs[16], d[16];
        store(probs, prob);
        store(d, value);
        d[target - n] = g * (1.0f - probs[target - n]);
        value = load(d);
      }
      if (has_entropy) value = fma(mul(minus_ge, prob), add(logp, entropy), value);
      store_rounded(dl + n, value);
    }
  }

  // dh (+)= dl . w, one chain over the vocabulary.
  void add_dh(std::int64_t row, std::int64_t count) const {
    const TileSplit tiles(count);
    const std::int64_t steps = num_k_steps(in_.dtype, entries_);
    const KStep* columns = w_columns_ + first_ / kEntries * run_columns();
    const Range panels = split(in_panels_, thread_, num_threads_);
    for (std::int64_t panel = panels.begin; panel < panels.end; ++panel)
      for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
        const std::int64_t begin = tiles.begin(tile);
        multiply_onto<sizeof(T) == 2, 1>(
            dh_ + (row + begin) * width_ + panel * kPanel, width_, columns + panel * steps * kPanel,
            kPanel, 2, dl_tokens() + begin * steps, tiles.rows(tile), tiles.rows(tile), steps,
            first_ == 0 ? Onto::kStore : Onto::kChain);
      }
  }

  // dw (+)= dl^T . h, one chain over the block's tokens.
  void add_dw(std::int64_t row, std::int64_t count) const {
    const TileSplit tiles(entries_);
    const std::int64_t steps = num_k_steps(in_.dtype, count);
    const Range own = split(tiles.count, thread_, num_threads_);
    for (std::int64_t tile = own.begin; tile < own.end; ++tile)
      pack_columns(dl_entries_ + tiles.begin(tile) * steps, tiles.begin(tile), tiles.rows(tile),
                   count, steps);
    const KStep* columns = h_columns_ + row / chain_ * block_columns();
    for (std::int64_t panel = 0; panel < in_panels_; ++panel)
      for (std::int64_t tile = own.begin; tile < own.end; ++tile) {
        const std::int64_t begin = tiles.begin(tile);
        multiply_onto<sizeof(T) == 2, 1>(
            dw() + begin * width_ + panel * kPanel, width_, columns + panel * steps * kPanel,
            kPanel, 2, dl_entries_ + begin * steps, tiles.rows(tile), tiles.rows(tile), steps,
            begin_ + row == 0 ? Onto::kStore : Onto::kPromote);
      }
  }

  // Columns [first, first + num_columns) of dl as rows of x: k-steps over tokens.
  void pack_columns(KStep* out, std::int64_t first, int num_columns, std::int64_t count,
                    std::int64_t steps) const {
    for (std::int64_t k = 0; k < steps; ++k) {
      constexpr std::int64_t kStepTokens = 4 / sizeof(T);
      const T* low = dl() + k * kStepTokens * kEntries + first;
      const bool has_pair = kStepTokens == 2 && 2 * k + 1 < count;
      for (int m = 0; m < num_columns; ++m) {
        T pair[kStepTokens] = {low[m]};
        if (has_pair) pair[kStepTokens - 1] = low[kEntries + m];
        std::memcpy(out + k * num_columns + m, pair, sizeof(KStep));
      }
    }
  }

  // Numbers [from, to) of a row.
  void write_row(T* out, const float* row, std::int64_t from, std::int64_t to) const {
    for (std::int64_t i = from; i < to; i += 16)
      store_first_rounded(out + i, load(row + i),
                          static_cast<int>(std::min<std::int64_t>(16, to - i)));
  }
  // The rows this thread summed.
  void write_dw() const {
    const TileSplit tiles(entries_);
    const Range own = split(tiles.count, thread_, num_threads_);
    const std::int64_t end = own.end == tiles.count ? entries_ : tiles.begin(own.end);
    for (std::int64_t i = tiles.begin(own.begin); i < end; ++i)
      write_row(static_cast<T*>(p_.dw) + (first_ + i) * in_.in_dim, dw() + i * width_, 0,
                in_.in_dim);
  }
  // The columns this thread summed.
  void write_dh() const {
    const Range panels = split(in_panels_, thread_, num_threads_);
    for (std::int64_t row = 0; row < num_rows_; ++row)
      write_row(static_cast<T*>(p_.dh) + (begin_ + row) * in_.in_dim, dh_ + row * width_,
                panels.begin * kPanel, std::min(panels.end * kPanel, in_.in_dim));
  }

  const LinearLogpBwdParams& p_;
  const LmHeadInput& in_;
  const std::int64_t in_steps_, in_panels_, width_, num_blocks_, logit_stride_;
  const std::int64_t chain_;              // tokens a chain of dw goes over
  std::int64_t room_;                     // tokens whose logits are kept at a time
  std::int64_t entry_room_, chain_room_;  // k-steps of a run of entries, and of a chain
  float *logits_, *moments_, *lse_, *entropy_, *dh_, *dw_;
  BlockSum* sums_;
  KStep *h_rows_, *h_columns_, *w_columns_, *dl_tokens_, *dl_entries_;
  T* dl_;
  int thread_ = 0, num_threads_ = 1, buffer_ = 0;
  std::int64_t begin_ = 0, num_rows_ = 0;  // of the tokens in hand
  std::int64_t first_ = 0, entries_ = 0;   // of the run in hand
};

template <class T>
void linear_logp_bwd_typed(const LinearLogpBwdParams& p) {
  const LmHeadInput& in = p.input;
  const std::int64_t known = in.num_tokens == 0 ? 0 : in.vocab_size;
  std::memset(static_cast<T*>(p.dw) + known * in.in_dim, 0,
              static_cast<std::size_t>((p.num_rows - known) * in.in_dim) * sizeof(T));
  if (in.num_tokens == 0) return;
  const LogpBwd<T> shared(p);
  const bool is_small = in.num_tokens * in.in_dim * in.vocab_size < kMinParallelWork;
  parallel(is_small ? 1 : p.num_threads, [&](int thread, int num_threads) {
    LogpBwd<T> own(shared);
    own.run(thread, num_threads);
  });
}

}  // namespace

void linear_logp_bwd(const LinearLogpBwdParams& p) {
  if (p.input.dtype == DType::kF32)
    return TML_F32(linear_logp_bwd, linear_logp_bwd_typed<float>)(p);
  linear_logp_bwd_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
