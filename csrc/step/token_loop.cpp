#include "step/token_loop.h"

#include <algorithm>
#include <chrono>

#include "core/team.h"
#include "cpu/cpu.h"

namespace tml {
namespace {

// The phase after a token, -1 if the caller decides.
std::int32_t phase_after(const TokenTable& table, TokenRow* row, std::int64_t token) {
  const std::int32_t* next = table.next + row->phase * (table.num_controls + 1);
  for (std::int64_t i = 0; i < table.num_controls; ++i)
    if (table.controls[i] == token) return next[i];
  return --row->num_text == 0 ? -1 : next[table.num_controls];
}

}  // namespace

TokenLoop::TokenLoop(const TokenWeights& weights, std::int64_t hidden, DType dtype,
                     std::int64_t max_rows)
    : weights_(weights),
      hidden_(hidden),
      num_words_((weights.vocab_size + 31) / 32),
      dtype_(dtype) {
  const auto rows = static_cast<std::size_t>(max_rows);
  const std::size_t hidden_bytes = rows * static_cast<std::size_t>(hidden) * size_of(dtype);
  x_ = std::make_unique<std::byte[]>(hidden_bytes);
  h_ = std::make_unique<std::byte[]>(hidden_bytes);
  rows_.resize(rows);
  for (auto* one : {&row_ids_, &ids_, &positions_, &seeds_, &draws_, &drawn_}) one->resize(rows);
  for (auto* one : {&slots_, &top_k_}) one->resize(rows);
  for (auto* one : {&temperature_, &top_p_, &logprobs_}) one->resize(rows);
  cu_tokens_.resize(rows + 1);
  for (std::size_t row = 0; row <= rows; ++row) cu_tokens_[row] = static_cast<std::int32_t>(row);
  masks_.resize(rows * static_cast<std::size_t>(num_words_));
  masked_by_.resize(rows, nullptr);
}

void TokenLoop::feed(std::int64_t index, const TokenRow& row) {
  const auto i = static_cast<std::size_t>(index);
  ids_[i] = row.token;
  positions_[i] = row.position;
  draws_[i] = row.position + 1;
  slots_[i] = row.slot;
  seeds_[i] = row.seed;
  temperature_[i] = row.temperature;
  top_k_[i] = row.top_k;
  top_p_[i] = row.top_p;
}

void TokenLoop::allow(std::int64_t index, const TokenTable& table, std::int32_t phase) {
  const std::int32_t* mask = table.masks + phase * num_words_;
  const std::int32_t*& known = masked_by_[static_cast<std::size_t>(index)];
  if (known == mask) return;
  std::copy_n(mask, num_words_, masks_.data() + index * num_words_);
  known = mask;
}

TokenRun TokenLoop::run(const DecoderStep& step, const DecoderState& state, const TokenTable& table,
                        const TokenRow* rows, std::int64_t num_rows, std::int64_t max_run,
                        std::int64_t* tokens, float* logprobs, std::int32_t* counts, double limit_s,
                        int num_threads) {
  using Clock = std::chrono::steady_clock;
  TokenRun done{0, 0};
  std::int64_t num_active = num_rows;
  // The table of an earlier call may have stood at the same address.
  std::fill(masked_by_.begin(), masked_by_.end(), nullptr);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    rows_[static_cast<std::size_t>(row)] = rows[row];
    row_ids_[static_cast<std::size_t>(row)] = row;
    counts[row] = 0;
  }
  const auto one_step = [&] {
    for (std::int64_t i = 0; i < num_active; ++i) {
      feed(i, rows_[static_cast<std::size_t>(i)]);
      allow(i, table, rows_[static_cast<std::size_t>(i)].phase);
    }
    cpu::embed({ids_.data(), weights_.embed_table, weights_.embed_norm, x_.get(), hidden_, hidden_,
                num_active, hidden_, weights_.embed_eps, dtype_, num_threads});
    const StepBatch batch{cu_tokens_.data(),
                          slots_.data(),
                          positions_.data(),
                          positions_.data(),
                          static_cast<std::int32_t>(num_active),
                          num_active};
    step.run(x_.get(), h_.get(), batch, state, num_threads);
    const LmHeadInput input{h_.get(), weights_.head,       hidden_, num_active,
                            hidden_,  weights_.vocab_size, dtype_};
    cpu::lm_head_sample({input, temperature_.data(), top_k_.data(), top_p_.data(), seeds_.data(),
                         draws_.data(), masks_.data(), drawn_.data(), logprobs_.data(),
                         num_threads});
    ++done.num_steps;
    done.num_tokens += num_active;
    std::int64_t num_left = 0;
    for (std::int64_t i = 0; i < num_active; ++i) {
      TokenRow row = rows_[static_cast<std::size_t>(i)];
      const std::int64_t id = row_ids_[static_cast<std::size_t>(i)];
      const std::int64_t token = drawn_[static_cast<std::size_t>(i)];
      const std::int64_t at = id * max_run + counts[id]++;
      tokens[at] = token;
      logprobs[at] = logprobs_[static_cast<std::size_t>(i)];
      row.phase = phase_after(table, &row, token);
      row.token = token;
      ++row.position;
      if (row.phase < 0 || --row.room == 0) continue;
      rows_[static_cast<std::size_t>(num_left)] = row;
      row_ids_[static_cast<std::size_t>(num_left++)] = id;
    }
    num_active = num_left;
  };
  const auto all_steps = [&] {
    const auto begin = Clock::now();
    while (num_active > 0) {
      one_step();
      if (std::chrono::duration<double>(Clock::now() - begin).count() >= limit_s) break;
    }
  };
  const auto run_steps = [](const void* steps) {
    (*static_cast<const decltype(all_steps)*>(steps))();
  };
  with_team(num_threads, run_steps, &all_steps);
  return done;
}

}  // namespace tml
