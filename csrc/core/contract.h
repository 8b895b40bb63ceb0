// Contract v1: the constants that decide the bits of the forward path. Changing one is a new
// version.
#pragma once

namespace tml::contract {

inline constexpr int kVersion = 1;
// Keys of one attention unit, and positions of one KV page: the kernels read whole units.
inline constexpr int kPageLen = 128;
// Keys of one segment: units are left-folded inside it, segments are left-folded.
inline constexpr int kSegmentLen = 2048;
// Taps of the depthwise causal convolutions; the state is the kConvTaps - 1 previous inputs.
inline constexpr int kConvTaps = 4;
// Entries of one vocabulary block of the log-sum-exp; blocks are left-folded.
inline constexpr int kVocabBlock = 128;
// Outputs of one packed weight panel (layout only, never in a sum).
inline constexpr int kPanel = 32;
// Virtual lanes of a row reduction: lane j sums elements j, j + 16, ...; then a fixed halving tree.
inline constexpr int kLanes = 16;
// Tokens of one block of a parameter gradient: summed from 0 in ascending order; blocks
// left-folded.
inline constexpr int kGradBlock = 512;

}  // namespace tml::contract
