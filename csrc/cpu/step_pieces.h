// A step cut into pieces: runs of tokens of one sequence that one thread handles at a time.
#pragma once

#include "cpu/parallel.h"
#include "ops/step_batch.h"

namespace tml::cpu::TML_ISA_NS {

struct Piece {
  std::int64_t seq;     // index in the batch
  std::int64_t offset;  // tokens of the sequence in the step before this piece
  std::int64_t count;   // > 0
};

// The first piece of a sequence takes the three tokens whose convolution reads the state, so the
// thread that has it may overwrite the state afterwards: no other thread looks at it. Later pieces
// begin where origin(seq) + offset is a multiple of `len`.
template <class Origin>
class StepPieces {
 public:
  StepPieces(const StepBatch& batch, std::int64_t len, const Origin& origin)
      : batch_(batch), len_(len), origin_(origin) {
    for (std::int64_t s = 0; s < batch.num_seqs; ++s) count_ += num_pieces(s);
  }
  std::int64_t count() const { return count_; }

  // body(piece id, Piece) for each piece of [range.begin, range.end).
  template <class Body>
  void each(Range range, const Body& body) const {
    std::int64_t before = 0;
    for (std::int64_t s = 0; s < batch_.num_seqs && before < range.end; ++s) {
      const std::int64_t pieces = num_pieces(s);
      const std::int64_t first = range.begin > before ? range.begin - before : 0;
      const std::int64_t last = range.end - before < pieces ? range.end - before : pieces;
      for (std::int64_t i = first; i < last; ++i) {
        const std::int64_t begin = i == 0 ? 0 : cut(s) + (i - 1) * len_;
        const std::int64_t end = i + 1 == pieces ? tokens(s) : cut(s) + i * len_;
        body(before + i, Piece{s, begin, end - begin});
      }
      before += pieces;
    }
  }

 private:
  std::int64_t tokens(std::int64_t s) const {
    return batch_.cu_tokens[s + 1] - batch_.cu_tokens[s];
  }
  // Where the first piece ends, if the sequence is that long.
  std::int64_t cut(std::int64_t s) const {
    return ceil_div(origin_(s) + contract::kConvTaps - 1, len_) * len_ - origin_(s);
  }
  std::int64_t num_pieces(std::int64_t s) const {
    if (tokens(s) == 0) return 0;
    return tokens(s) <= cut(s) ? 1 : 1 + ceil_div(tokens(s) - cut(s), len_);
  }

  const StepBatch& batch_;
  std::int64_t len_;
  const Origin& origin_;
  std::int64_t count_ = 0;
};

}  // namespace tml::cpu::TML_ISA_NS
