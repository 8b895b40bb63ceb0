// sconv_norm: a thread owns pieces of kPieceLen tokens. Sixteen channels of a piece at a time: the
// taps are loaded once and the tokens slide past; each token's sum of squares grows in its own
// vector, so the norm needs one more pass over rows that are still in L1 or L2.
#include "ops/sconv_norm.h"

#include "cpu/cpu.h"
#include "cpu/row_norm.h"
#include "cpu/short_conv.h"
#include "cpu/step_pieces.h"

namespace tml::cpu::TML_ISA_NS {
namespace {

constexpr int kPieceLen = 16;
// Below this many elements a second thread costs more than it saves.
constexpr std::int64_t kMinParallelElements = 48 << 10;

template <class T>
void convolve_piece(const SconvNormParams& p, const ConvInput<T>& input, const Piece& piece) {
  const std::int64_t token = p.batch.cu_tokens[piece.seq] + piece.offset;
  T* residual = static_cast<T*>(p.residual) + token * p.residual_row_stride;
  Vec squares[kPieceLen];
  for (Vec& s : squares) s = zero();
  for (std::int64_t channel = 0; channel < p.dim; channel += 16)
    input.convolve(channel, p.conv_weight, piece.offset, piece.count, [&](std::int64_t i, Vec y) {
      T* out = residual + i * p.residual_row_stride + channel;
      const Vec sum = round_through<T>(add(load_as_f32(out), y));
      store_rounded(out, sum);
      squares[i] = fma(sum, sum, squares[i]);
    });
  if (p.norm_weight == nullptr) return;
  const auto* weight = static_cast<const T*>(p.norm_weight);
  T* normed = static_cast<T*>(p.normed) + token * p.normed_row_stride;
  for (std::int64_t i = 0; i < piece.count; ++i)
    scale_row(residual + i * p.residual_row_stride, weight, normed + i * p.normed_row_stride, p.dim,
              rstd_of(squares[i], p.dim, p.eps));
}

template <class T>
void sconv_norm_typed(const SconvNormParams& p) {
  // The convolution does not know positions: pieces count from the step's first token.
  const auto origin = [](std::int64_t) { return std::int64_t{0}; };
  const StepPieces pieces(p.batch, kPieceLen, origin);
  const bool is_small = p.batch.num_tokens * p.dim < kMinParallelElements;
  parallel(is_small ? 1 : p.num_threads, [&](int thread, int num_threads) {
    pieces.each(split(pieces.count(), thread, num_threads), [&](std::int64_t, const Piece& piece) {
      const ConvInput<T> input{
          static_cast<const T*>(p.x) + p.batch.cu_tokens[piece.seq] * p.x_row_stride,
          p.x_row_stride,
          static_cast<T*>(p.conv.rows) + p.batch.slots[piece.seq] * p.conv.slot_stride,
          p.conv.row_stride};
      convolve_piece(p, input, piece);
      if (piece.offset == 0)
        input.advance(p.batch.cu_tokens[piece.seq + 1] - p.batch.cu_tokens[piece.seq], p.dim);
    });
  });
}

}  // namespace

void sconv_norm(const SconvNormParams& p) {
  if (p.batch.num_tokens == 0 || p.dim == 0) return;
  if (p.dtype == DType::kF32) return TML_F32(sconv_norm, sconv_norm_typed<float>)(p);
  sconv_norm_typed<std::uint16_t>(p);
}

}  // namespace tml::cpu::TML_ISA_NS
