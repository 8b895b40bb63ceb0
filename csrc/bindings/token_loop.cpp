#include "step/token_loop.h"

#include <nanobind/nanobind.h>

#include <cmath>
#include <string>
#include <vector>

#include "bindings/decoder_step.h"
#include "bindings/module.h"
#include "bindings/step_batch.h"
#include "core/contract.h"
#include "ops/lm_head.h"

namespace tml {
namespace {

constexpr const char* kOp = "token_loop";

[[noreturn]] void refuse(const std::string& what, const std::string& expected,
                         const std::string& got) {
  throw ArgumentError(std::string(kOp) + ": " + what + " must be " + expected + ", got " + got);
}

std::string range_text(std::int64_t begin, std::int64_t end) {
  return "in [" + std::to_string(begin) + ", " + std::to_string(end) + ")";
}

void check_range(const std::string& what, std::int64_t value, std::int64_t begin,
                 std::int64_t end) {
  if (value < begin || value >= end) refuse(what, range_text(begin, end), std::to_string(value));
}

// A token table and the tensors it reads.
class PyTokenTable {
 public:
  PyTokenTable(nb::handle masks_h, nb::handle controls_h, nb::handle next_h,
               std::int64_t vocab_size)
      : vocab_size_(vocab_size) {
    const Tensor masks(masks_h, kOp, "masks"), controls(controls_h, kOp, "controls");
    const Tensor next(next_h, kOp, "next");
    controls.dtype(DType::kI64).rank(1).contiguous();
    const std::int64_t words = ceil_div(vocab_size, std::int64_t{32});
    masks.dtype(DType::kI32).shape({kAny, words}).contiguous();
    next.dtype(DType::kI32).shape({masks.size(0), controls.size(0) + 1}).contiguous();
    table_ = {
        masks.data<const std::int32_t>(),    masks.size(0),    words,
        controls.data<const std::int64_t>(), controls.size(0), next.data<const std::int32_t>()};
    const std::uint32_t last_word = ~0u >> (words * 32 - vocab_size);
    for (std::int64_t phase = 0; phase < table_.num_phases; ++phase) {
      bool is_any = false;
      for (std::int64_t word = 0; word < words; ++word) {
        const auto bits = static_cast<std::uint32_t>(table_.masks[phase * words + word]);
        is_any |= (word < words - 1 ? bits : bits & last_word) != 0;
      }
      if (!is_any)
        masks.refuse("a mask with at least one bit set for each phase",
                     "none for phase " + std::to_string(phase));
    }
    for (std::int64_t i = 0; i < next.numel(); ++i)
      check_range("next", table_.next[i], -1, table_.num_phases);
    kept_.append(masks_h);
    kept_.append(controls_h);
    kept_.append(next_h);
  }

  const TokenTable& table() const { return table_; }
  std::int64_t vocab_size() const { return vocab_size_; }

 private:
  TokenTable table_{};
  std::int64_t vocab_size_;
  nb::list kept_;
};

// The loop over one decoder and one store, with the memory of its rows.
class PyTokenLoop {
 public:
  PyTokenLoop(nb::handle decoder, nb::handle embed_table_h, nb::handle embed_norm_h,
              float embed_eps, nb::handle head_h, std::int64_t vocab_size, nb::handle global_pages,
              nb::handle sliding_pages, nb::handle global_table, nb::handle sliding_table,
              nb::handle conv_rows, nb::handle rows_h, nb::handle tokens_h, nb::handle logprobs_h,
              nb::handle counts_h)
      : decoder_(nb::cast<const PyDecoderStep*>(decoder)),
        kv_{{global_pages, sliding_pages}, {global_table, sliding_table}, conv_rows} {
    const DecoderShape& shape = decoder_->step().shape();
    const Tensor table(embed_table_h, kOp, "embed_table"), norm(embed_norm_h, kOp, "embed_norm");
    const Tensor head(head_h, kOp, "head"), rows(rows_h, kOp, "rows");
    const Tensor tokens(tokens_h, kOp, "tokens"), logprobs(logprobs_h, kOp, "logprobs");
    const Tensor counts(counts_h, kOp, "counts");
    table.dtype(shape.dtype).shape({kAny, shape.hidden}).contiguous();
    norm.dtype(shape.dtype).shape({shape.hidden}).contiguous();
    head.dtype(shape.dtype).contiguous().aligned(64);
    const std::int64_t pair = shape.dtype == DType::kBf16 ? 2 : 1;
    const std::int64_t panel_size =
        num_k_steps(shape.dtype, shape.hidden) * contract::kPanel * pair;
    if (vocab_size < 1 || head.numel() % panel_size != 0 ||
        head.numel() / panel_size * contract::kPanel < vocab_size)
      head.refuse("packed for at least vocab_size = " + std::to_string(vocab_size) + " >= 1 ids",
                  std::to_string(head.numel()) + " elements");
    rows.dtype(DType::kI64).shape({kAny, kWords}).contiguous();
    tokens.dtype(DType::kI64).shape({rows.size(0), kAny}).contiguous();
    logprobs.dtype(DType::kF32).shape({rows.size(0), tokens.size(1)}).contiguous();
    counts.dtype(DType::kI32).shape({rows.size(0)}).contiguous();
    if (tokens.size(1) < 1) tokens.refuse("[rows, at least 1]", "no columns");
    vocab_size_ = vocab_size;
    embed_size_ = table.size(0);
    max_rows_ = rows.size(0);
    max_run_ = tokens.size(1);
    rows_ = rows.data<const TokenRow>();
    tokens_ = tokens.data<std::int64_t>();
    logprobs_ = logprobs.data<float>();
    counts_ = counts.data<std::int32_t>();
    const TokenWeights weights{table.data(), norm.data(), head.data(), vocab_size, embed_eps};
    loop_ = std::make_unique<TokenLoop>(weights, shape.hidden, shape.dtype, max_rows_);
    cu_tokens_.resize(static_cast<std::size_t>(max_rows_) + 1);
    slots_.resize(static_cast<std::size_t>(max_rows_));
    positions_.resize(static_cast<std::size_t>(max_rows_));
    for (const nb::handle tensor :
         {decoder, embed_table_h, embed_norm_h, head_h, global_pages, sliding_pages, global_table,
          sliding_table, conv_rows, rows_h, tokens_h, logprobs_h, counts_h})
      kept_.append(tensor);
  }

  nb::typed<nb::tuple, std::int64_t, std::int64_t> run(std::int64_t num_rows,
                                                       const PyTokenTable& table, double limit_s,
                                                       int num_threads) {
    check_range("num_rows", num_rows, 0, max_rows_ + 1);
    if (table.vocab_size() != vocab_size_)
      refuse("table", "for " + std::to_string(vocab_size_) + " ids",
             std::to_string(table.vocab_size()));
    const DecoderState state = decoder_->state(kOp, kv_, checked_batch(num_rows, table.table()));
    TokenRun done{};
    {
      nb::gil_scoped_release release;
      done = loop_->run(decoder_->step(), state, table.table(), rows_, num_rows, max_run_, tokens_,
                        logprobs_, counts_, limit_s, num_threads);
    }
    return nb::typed<nb::tuple, std::int64_t, std::int64_t>(
        nb::make_tuple(done.num_steps, done.num_tokens));
  }

 private:
  static constexpr std::int64_t kWords = sizeof(TokenRow) / sizeof(std::int64_t);

  // All the positions that may be fed.
  StepBatch checked_batch(std::int64_t num_rows, const TokenTable& table) {
    const std::int64_t num_slots = decoder_->num_slots(kOp, kv_);
    for (std::int64_t i = 0; i < num_rows; ++i) {
      const TokenRow& row = rows_[i];
      const std::string at = "rows[" + std::to_string(i) + "]";
      check_range(at + ".slot", row.slot, 0, num_slots);
      for (std::int64_t other = 0; other < i; ++other)
        if (rows_[other].slot == row.slot)
          refuse(at + ".slot", "distinct within a step", std::to_string(row.slot));
      check_range(at + ".position", row.position, 0, std::int64_t{1} << 62);
      check_range(at + ".token", row.token, 0, embed_size_);
      check_range(at + ".phase", row.phase, 0, table.num_phases);
      check_range(at + ".num_text", row.num_text, 1, std::int64_t{1} << 31);
      check_range(at + ".room", row.room, 1, max_run_ + 1);
      check_range(at + ".top_k", row.top_k, 0, std::int64_t{1} << 31);
      const float t = row.temperature;
      if (!(t == 0.0f || (t >= kMinTemperature && std::isfinite(t))))
        refuse(at + ".temperature", "0 (greedy) or in [1e-6, inf)", std::to_string(t));
      if (!(row.top_p > 0.0f && row.top_p <= 1.0f))
        refuse(at + ".top_p", "in (0, 1]", std::to_string(row.top_p));
      const auto at_i = static_cast<std::size_t>(i);
      cu_tokens_[at_i + 1] = cu_tokens_[at_i] + row.room;
      slots_[at_i] = row.slot;
      positions_[at_i] = row.position;
    }
    const std::int64_t num_tokens = cu_tokens_[static_cast<std::size_t>(num_rows)];
    return {cu_tokens_.data(),
            slots_.data(),
            positions_.data(),
            nullptr,
            static_cast<std::int32_t>(num_rows),
            num_tokens};
  }

  const PyDecoderStep* decoder_;
  PyKvStore kv_;
  std::int64_t vocab_size_, embed_size_, max_rows_, max_run_;
  const TokenRow* rows_;
  std::int64_t* tokens_;
  float* logprobs_;
  std::int32_t* counts_;
  std::unique_ptr<TokenLoop> loop_;
  std::vector<std::int32_t> cu_tokens_, slots_;
  std::vector<std::int64_t> positions_;
  nb::list kept_;
};

}  // namespace

void bind_token_loop(nb::module_& m) {
  nb::class_<PyTokenTable>(m, "TokenTable",
                           "What may be drawn in each phase of an output, and what follows.")
      .def(nb::init<nb::handle, nb::handle, nb::handle, std::int64_t>(), nb::arg("masks"),
           nb::arg("controls"), nb::arg("next"), nb::arg("vocab_size"));
  nb::class_<PyTokenLoop>(m, "TokenLoop",
                          "Single tokens of several sequences, step after step, in one call.")
      .def(nb::init<nb::handle, nb::handle, nb::handle, float, nb::handle, std::int64_t, nb::handle,
                    nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, nb::handle,
                    nb::handle, nb::handle>(),
           nb::arg("decoder"), nb::arg("embed_table"), nb::arg("embed_norm"), nb::arg("embed_eps"),
           nb::arg("head"), nb::arg("vocab_size"), nb::arg("global_pages"),
           nb::arg("sliding_pages"), nb::arg("global_table"), nb::arg("sliding_table"),
           nb::arg("conv_rows"), nb::arg("rows"), nb::arg("tokens"), nb::arg("logprobs"),
           nb::arg("counts"))
      .def("run", &PyTokenLoop::run, nb::arg("num_rows"), nb::arg("table"), nb::arg("limit_s"),
           nb::arg("num_threads"));
}

}  // namespace tml
