// token_loop: single tokens of several sequences through embed, all layers and the draw, step after
// step, for as long as a table says what may follow. It only strings the ops together: a token and
// its log-probability have the bits of embed, decoder_step and lm_head_sample called one by one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/dtype.h"
#include "step/decoder_step.h"

namespace tml {

// What may be drawn in each phase of an output, and the phase that follows.
struct TokenTable {
  const std::int32_t* masks;  // [num_phases, num_words] bits of the ids
  std::int64_t num_phases, num_words;
  const std::int64_t* controls;  // [num_controls] ids that are no text
  std::int64_t num_controls;
  const std::int32_t* next;  // [num_phases, num_controls + 1]: after each control, after text; -1:
                             // the caller decides
};

// One sequence. Fed are `token`, at `position`, and all but the last of the tokens drawn.
struct TokenRow {
  std::int64_t position, token, seed;
  std::int32_t slot, phase;
  std::int32_t num_text;  // texts that may be drawn
  std::int32_t room;      // tokens that may be fed, at least 1
  float temperature, top_p;
  std::int32_t top_k, padding;
};
static_assert(sizeof(TokenRow) == 56);

struct TokenWeights {
  const void* embed_table;  // [vocab, hidden]
  const void* embed_norm;   // [hidden]
  const void* head;         // packed [vocab, hidden]
  std::int64_t vocab_size;  // ids that may be drawn
  float embed_eps;
};

struct TokenRun {
  std::int64_t num_steps, num_tokens;
};

class TokenLoop {
 public:
  TokenLoop(const TokenWeights& weights, std::int64_t hidden, DType dtype, std::int64_t max_rows);

  // Draws at least one token for each row: row r's go to tokens and logprobs [r * max_run, ...),
  // how many to counts[r] (at most its room). A row stops at a token whose next phase is -1, with
  // its texts or its room used up; all stop after the first step that ends past limit_s.
  TokenRun run(const DecoderStep& step, const DecoderState& state, const TokenTable& table,
               const TokenRow* rows, std::int64_t num_rows, std::int64_t max_run,
               std::int64_t* tokens, float* logprobs, std::int32_t* counts, double limit_s,
               int num_threads);

 private:
  void feed(std::int64_t index, const TokenRow& row);
  void allow(std::int64_t index, const TokenTable& table, std::int32_t phase);

  TokenWeights weights_;
  std::int64_t hidden_, num_words_;
  DType dtype_;
  std::unique_ptr<std::byte[]> x_, h_;
  std::vector<TokenRow> rows_;
  std::vector<std::int64_t> row_ids_, ids_, positions_, seeds_, draws_, drawn_;
  std::vector<std::int32_t> cu_tokens_, slots_, top_k_, masks_;
  std::vector<const std::int32_t*> masked_by_;  // what each row of masks_ is a copy of
  std::vector<float> temperature_, top_p_, logprobs_;
};

}  // namespace tml
