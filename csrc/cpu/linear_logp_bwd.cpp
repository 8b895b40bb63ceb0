// linear_logp_bwd: the vocabulary in runs of 512 entries, the tokens in blocks of 512. For each
// pair the logits are recomputed and turned into dl, in the cache; then dh (split by columns of h)
// and dw (split by entries) take their products from it. Each sum belongs to one thread.
#include "cpu/arena.h"
#include "cpu/cpu.h"
#include "cpu/panel_onto.h"
#include "cpu/parallel.h"
#include "ops/linear_logp.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

constexpr std::int64_t kPanel = contract::kPanel;
constexpr std::int64_t kTokens = contract::kGradBlock;
constexpr std::int64_t kEntries = 512;    // of the vocabulary, at a time: moves work, never a bit
constexpr std::int64_t kReusePanels = 4;  // of the weights, kept in L2 for all tiles of tokens
// Below this many products a second thread costs more than it saves.
constexpr std::int64_t kMinParallelWork = 1 << 17;

template <class T>
class LogpBwd {
 public:
  explicit LogpBwd(const LinearLogpBwdParams& p)
      : p_(p),
        in_steps_(num_k_steps(p.dtype, p.in_dim)),
        in_panels_(ceil_div(p.in_dim, kPanel)),
        width_(in_panels_ * kPanel) {
    const std::int64_t blocks = ceil_div(p.num_tokens, kTokens);
    const std::int64_t entries = std::min(kEntries, ceil_div(p.vocab_size, kPanel) * kPanel);
    entry_room_ = num_k_steps(p.dtype, entries);
    Arena(Scratch::kOp)
        .take(&h_rows_, p.num_tokens * in_steps_)
        .take(&h_columns_, blocks * block_columns())
        .take(&dh_, p.num_tokens * width_)
        .take(&w_rows_, entries * in_steps_)
        .take(&w_columns_, in_panels_ * entry_room_ * kPanel)
        .take(&dl_, kTokens * kEntries)
        .take(&dl_tokens_, kTokens * entry_room_)
        .take(&dl_entries_, kEntries * num_k_steps(p.dtype, kTokens))
        .take(&dw_, kEntries * width_)
        .commit();
  }

  void run(int thread, int num_threads) {
    thread_ = thread;
    num_threads_ = num_threads;
    pack_tokens();
    for (first_ = 0; first_ < p_.vocab_size; first_ += kEntries) {
      entries_ = std::min(kEntries, p_.vocab_size - first_);
      pack_entries();
      barrier();
      for (std::int64_t token = 0; token < p_.num_tokens; token += kTokens) {
        const std::int64_t count = std::min(kTokens, p_.num_tokens - token);
        differentiate(token, count);
        barrier();
        add_dh(token, count);
        add_dw(token, count);
        barrier();
      }
      write_dw();
    }
    write_dh();
  }

 private:
  void barrier() const {
    if (num_threads_ > 1) {
      team_barrier();
    }
  }
  std::int64_t block_columns() const {
    return in_panels_ * num_k_steps(p_.dtype, kTokens) * kPanel;
  }
  const T* h(std::int64_t token) const {
    return static_cast<const T*>(p_.h) + token * p_.h_row_stride;
  }
  const T* w(std::int64_t entry) const {
    return static_cast<const T*>(p_.weight) + (first_ + entry) * p_.weight_row_stride;
  }
  bool is_ignored(std::int64_t token) const { return p_.targets[token] == kIgnoredTarget; }

  // h as rows of x (for the logits) and as weights over tokens (for dw).
  void pack_tokens() const {
    for (std::int64_t token = 0; token < p_.num_tokens; token += kTokens) {
      const std::int64_t count = std::min(kTokens, p_.num_tokens - token);
      const TileSplit tiles(count);
      const Range own = split(tiles.count, thread_, num_threads_);
      for (std::int64_t tile = own.begin; tile < own.end; ++tile)
        pack_rows<T>(h_rows_ + (token + tiles.begin(tile)) * in_steps_, tiles.rows(tile), p_.in_dim,
                     [&](int m) { return h(token + tiles.begin(tile) + m); });
      const std::int64_t steps = num_k_steps(p_.dtype, count);
      const Range panels = split(in_panels_, thread_, num_threads_);
      for (std::int64_t panel = panels.begin; panel < panels.end; ++panel)
        pack_step_rows<T>(h_columns_ + token / kTokens * block_columns() + panel * steps * kPanel,
                          kPanel, count, panel * kPanel, p_.in_dim, 2, [&](std::int64_t i) {
                            return is_ignored(token + i) ? nullptr : h(token + i);
                          });
    }
  }

  // The run's weights as panels of entries (for the logits) and as weights over entries (for dh).
  void pack_entries() const {
    const Range rows = split(ceil_div(entries_, kPanel), thread_, num_threads_);
    for (std::int64_t panel = rows.begin; panel < rows.end; ++panel)
      for (std::int64_t i = 0; i < kPanel; ++i) {
        KStep* out = w_rows_ + panel * in_steps_ * kPanel + i;
        const std::int64_t entry = panel * kPanel + i;
        for (std::int64_t k = 0; k < in_steps_; ++k)
          out[k * kPanel] = entry < entries_ ? k_step(w(entry), k, p_.in_dim) : 0u;
      }
    const std::int64_t steps = num_k_steps(p_.dtype, entries_);
    const Range panels = split(in_panels_, thread_, num_threads_);
    for (std::int64_t panel = panels.begin; panel < panels.end; ++panel)
      pack_step_rows<T>(w_columns_ + panel * steps * kPanel, kPanel, entries_, panel * kPanel,
                        p_.in_dim, 2, [&](std::int64_t i) { return w(i); });
  }

  // dl of this thread's tiles of tokens, then the same as rows of x (for dh).
  void differentiate(std::int64_t token, std::int64_t count) const {
    alignas(64) float logits[kTileRows * kReusePanels * kPanel];
    constexpr std::int64_t kWidth = kReusePanels * kPanel;
    const TileSplit tiles(count);
    const Range own = split(tiles.count, thread_, num_threads_);
    const std::int64_t num_panels = ceil_div(entries_, kPanel);
    for (std::int64_t panel = 0; panel < num_panels; panel += kReusePanels)
      for (std::int64_t tile = own.begin; tile < own.end; ++tile) {
        const std::int64_t begin = tiles.begin(tile);
        const int rows = tiles.rows(tile);
        const std::int64_t end = std::min(panel + kReusePanels, num_panels);
        for (std::int64_t i = panel; i < end; ++i)
          multiply_onto<sizeof(T) == 2, 1>(
              logits + (i - panel) * kPanel, kWidth, w_rows_ + i * in_steps_ * kPanel, kPanel, 2,
              h_rows_ + (token + begin) * in_steps_, rows, rows, in_steps_, Onto::kStore);
        for (int m = 0; m < rows; ++m)
          differentiate_row(token + begin + m, panel * kPanel, end * kPanel, logits + m * kWidth,
                            dl_ + (begin + m) * kEntries);
      }
    const std::int64_t steps = num_k_steps(p_.dtype, entries_);
    for (std::int64_t tile = own.begin; tile < own.end; ++tile)
      pack_rows<T>(dl_tokens_ + tiles.begin(tile) * steps, tiles.rows(tile), entries_,
                   [&](int m) { return dl_ + (tiles.begin(tile) + m) * kEntries; });
  }

  // dl[begin, end) of one token from its logits.
  void differentiate_row(std::int64_t token, std::int64_t begin, std::int64_t end, float* logits,
                         T* dl) const {
    if (is_ignored(token)) {
      for (std::int64_t n = begin; n < end; n += 16) store_rounded(dl + n, zero());
      return;
    }
    const float g = p_.d_logprobs[token];
    const Vec lse = set1(p_.lse[token]), minus_g = set1(-g);
    const bool has_entropy = p_.d_entropy != nullptr;
    const Vec entropy = set1(has_entropy ? p_.entropy[token] : 0.0f);
    const Vec minus_ge = set1(has_entropy ? -p_.d_entropy[token] : 0.0f);
    const std::int64_t target = p_.targets[token] - first_;
    for (std::int64_t n = begin; n < end; n += 16) {
      const Vec logp = sub(load(logits + n - begin), lse);
      const Vec prob = exp(logp);
      alignas(64) float probs[16], d[16];
      store(probs, prob);
      store(d, mul(minus_g, prob));
      if (target >= n && target < n + 16) d[target - n] = g * (1.0f - probs[target - n]);
      Vec value = load(d);
      if (has_entropy) value = fma(mul(minus_ge, prob), add(logp, entropy), value);
      store_rounded(dl + n, value);
    }
  }

  // dh (+)= dl . w, one chain over the vocabulary.
  void add_dh(std::int64_t token, std::int64_t count) const {
    const TileSplit tiles(count);
    const std::int64_t steps = num_k_steps(p_.dtype, entries_);
    const Range panels = split(in_panels_, thread_, num_threads_);
    for (std::int64_t panel = panels.begin; panel < panels.end; ++panel)
      for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
        const std::int64_t begin = tiles.begin(tile);
        multiply_onto<sizeof(T) == 2, 1>(
            dh_ + (token + begin) * width_ + panel * kPanel, width_,
            w_columns_ + panel * steps * kPanel, kPanel, 2, dl_tokens_ + begin * steps,
            tiles.rows(tile), tiles.rows(tile), steps, first_ == 0 ? Onto::kStore : Onto::kChain);
      }
  }

  // dw (+)= dl^T . h, one chain over the block's tokens.
  void add_dw(std::int64_t token, std::int64_t count) const {
    const TileSplit tiles(entries_);
    const std::int64_t steps = num_k_steps(p_.dtype, count);
    const Range own = split(tiles.count, thread_, num_threads_);
    for (std::int64_t tile = own.begin; tile < own.end; ++tile)
      pack_columns(dl_entries_ + tiles.begin(tile) * steps, tiles.begin(tile), tiles.rows(tile),
                   count, steps);
    const KStep* columns = h_columns_ + token / kTokens * block_columns();
    for (std::int64_t panel = 0; panel < in_panels_; ++panel)
      for (std::int64_t tile = own.begin; tile < own.end; ++tile) {
        const std::int64_t begin = tiles.begin(tile);
        multiply_onto<sizeof(T) == 2, 1>(
            dw_ + begin * width_ + panel * kPanel, width_, columns + panel * steps * kPanel, kPanel,
            2, dl_entries_ + begin * steps, tiles.rows(tile), tiles.rows(tile), steps,
            token == 0 ? Onto::kStore : Onto::kPromote);
      }
  }

  // Columns [first, first + num_columns) of dl as rows of x: k-steps over tokens.
  void pack_columns(KStep* out, std::int64_t first, int num_columns, std::int64_t count,
                    std::int64_t steps) const {
    for (std::int64_t k = 0; k < steps; ++k) {
      constexpr std::int64_t kStepTokens = 4 / sizeof(T);
      const T* low = dl_ + k * kStepTokens * kEntries + first;
      const bool has_pair = kStepTokens == 2 && 2 * k + 1 < count;
      for (int m = 0; m < num_columns; ++m) {
        T pair[kStepTokens] = {low[m]};
        if (has_pair) pair[kStepTokens - 1] = low[kEntries + m];
        std::memcpy(out + k * num_columns + m, pair, sizeof(KStep));
      }
    }
  }

  void write_row(T* out, const float* from) const {
    for (std::int64_t i = 0; i < p_.in_dim; i += 16)
      store_first_rounded(out + i, load(from + i),
                          static_cast<int>(std::min<std::int64_t>(16, p_.in_dim - i)));
  }
  // The rows this thread summed.
  void write_dw() const {
    const TileSplit tiles(entries_);
    const Range own = split(tiles.count, thread_, num_threads_);
    const std::int64_t end = own.end == tiles.count ? entries_ : tiles.begin(own.end);
    for (std::int64_t i = tiles.begin(own.begin); i < end; ++i)
      write_row(static_cast<T*>(p_.dw) + (first_ + i) * p_.in_dim, dw_ + i * width_);
  }
  void write_dh() const {
    const Range rows = split(p_.num_tokens, thread_, num_threads_);
    for (std::int64_t i = rows.begin; i < rows.end; ++i)
      write_row(static_cast<T*>(p_.dh) + i * p_.in_dim, dh_ + i * width_);
  }

  const LinearLogpBwdParams& p_;
  const std::int64_t in_steps_, in_panels_, width_;
  std::int64_t entry_room_;  // k-steps of a whole run of entries
  KStep *h_rows_, *h_columns_, *w_rows_, *w_columns_, *dl_tokens_, *dl_entries_;
  float *dh_, *dw_;
  T* dl_;
  int thread_ = 0, num_threads_ = 1;
  std::int64_t first_ = 0, entries_ = 0;
};

template <class T>
void linear_logp_bwd_typed(const LinearLogpBwdParams& p) {
  const std::int64_t known = p.num_tokens == 0 ? 0 : p.vocab_size;
  std::memset(static_cast<T*>(p.dw) + known * p.in_dim, 0,
              static_cast<std::size_t>((p.num_rows - known) * p.in_dim) * sizeof(T));
  if (p.num_tokens == 0) return;
  const LogpBwd<T> shared(p);
  const bool is_small = p.num_tokens * p.in_dim * p.vocab_size < kMinParallelWork;
  parallel(is_small ? 1 : p.num_threads, [&](int thread, int num_threads) {
    LogpBwd<T> own(shared);
    own.run(thread, num_threads);
  });
}

}  // namespace

void linear_logp_bwd(const LinearLogpBwdParams& p) {
  if (p.dtype == DType::kF32) return TML_F32(linear_logp_bwd, linear_logp_bwd_typed<float>)(p);
  linear_logp_bwd_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
