// Where elements lie, in device memory and in shared memory: plain index functions, the same on the
// host (packing, tests) and on the device. Offsets in elements unless a name says bytes.
//
// A core tile is eight rows of sixteen bytes, 128 bytes in a row: what ldmatrix and wgmma read
// without bank conflicts, so operands that are stored as core tiles need no swizzle and travel to
// shared memory as plain contiguous bytes.
#pragma once

#include <cstdint>

#include "core/contract.h"

#if defined(__CUDACC__)
#define TML_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TML_HOST_DEVICE inline
#endif

namespace tml::cuda {

inline constexpr int kBlockRows = 64;   // outputs of a weight block: the M of wgmma
inline constexpr int kBlockDepth = 64;  // k of a weight block: four k16 steps
inline constexpr int kBlockElements = kBlockRows * kBlockDepth;
inline constexpr int kBlockBytes = 2 * kBlockElements;
inline constexpr int kCoreElements = 64;  // of a core tile: 8 x 8

TML_HOST_DEVICE constexpr std::int64_t blocks_of(std::int64_t n) { return (n + 63) / 64; }

// Weights, bf16: [blocks of 64 outputs][blocks of 64 k][core tile of 8 outputs][core tile of 8 k],
// zero-padded: a block of outputs is one stream in ascending k.
TML_HOST_DEVICE constexpr std::int64_t weight_offset(std::int64_t n, std::int64_t k,
                                                     std::int64_t k_blocks) {
  return (n / 64 * k_blocks + k / 64) * kBlockElements + n % 64 / 8 * (8 * kCoreElements) +
         k % 64 / 8 * kCoreElements + n % 8 * 8 + k % 8;
}
TML_HOST_DEVICE constexpr std::int64_t packed_elements(std::int64_t n, std::int64_t k) {
  return blocks_of(n) * blocks_of(k) * kBlockElements;
}

// Gate and up rows of SwiGLU interleave so that rows r and r + 8 of a fragment, which one thread
// holds, are the gate and the up of one unit: row -> (unit, is_up). 64 rows are 32 units.
inline constexpr int kBlockUnits = kBlockRows / 2;
TML_HOST_DEVICE constexpr std::int64_t swiglu_unit(std::int64_t row) {
  return row / 16 * 8 + row % 8;
}
TML_HOST_DEVICE constexpr bool swiglu_is_up(std::int64_t row) { return row % 16 >= 8; }

// K and V of a page (128 keys x head_dim), each as core tiles of 8 keys x 8 channels.
TML_HOST_DEVICE constexpr std::int64_t page_offset(std::int64_t key, std::int64_t channel,
                                                   std::int64_t head_dim) {
  return (key / 8 * (head_dim / 8) + channel / 8) * kCoreElements + key % 8 * 8 + channel % 8;
}

// The key of an element of K or of V.
TML_HOST_DEVICE constexpr std::int64_t page_key(std::int64_t offset, std::int64_t head_dim) {
  return offset / (head_dim * 8) * 8 + offset % kCoreElements / 8;
}

// Rows of 128 bytes whose sixteen-byte chunks are permuted by row: the 128-byte swizzle of the
// hardware, for a tile whose base is 1024-byte aligned. Rows are loaded coalesced, chunk by chunk.
TML_HOST_DEVICE constexpr int swizzled_bytes(int row, int chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// ---- wgmma matrix descriptors ----

enum class Swizzle : std::uint64_t { kNone = 0, k128 = 1 };

// lead: bytes between core tiles along k (kNone only); stride: bytes between groups of eight rows.
TML_HOST_DEVICE constexpr std::uint64_t matrix_descriptor(std::uint32_t address, std::uint32_t lead,
                                                          std::uint32_t stride, Swizzle swizzle) {
  return static_cast<std::uint64_t>((address & 0x3ffffu) >> 4) |
         static_cast<std::uint64_t>((lead & 0x3ffffu) >> 4) << 16 |
         static_cast<std::uint64_t>((stride & 0x3ffffu) >> 4) << 32 |
         static_cast<std::uint64_t>(swizzle) << 62;
}
// A weight block in shared memory, at k16 step `step`.
TML_HOST_DEVICE constexpr std::uint64_t weight_descriptor(std::uint32_t address, int step) {
  return matrix_descriptor(address + static_cast<std::uint32_t>(step) * 256u, 128, 1024,
                           Swizzle::kNone);
}
// A tile of token rows, 64 k wide, swizzled.
TML_HOST_DEVICE constexpr std::uint64_t token_descriptor(std::uint32_t address, int step) {
  return matrix_descriptor(address + static_cast<std::uint32_t>(step) * 32u, 16, 1024,
                           Swizzle::k128);
}
// How the hardware reads a descriptor: the shared-memory byte of element (row, k), k < 16.
TML_HOST_DEVICE constexpr std::uint32_t descriptor_byte(std::uint64_t descriptor, int row, int k) {
  const auto field = [descriptor](int shift) {
    return static_cast<std::uint32_t>(descriptor >> shift & 0x3fffu) << 4;
  };
  const std::uint32_t chunk = static_cast<std::uint32_t>(k) / 8, rest = k % 8 * 2;
  const std::uint32_t row8 = static_cast<std::uint32_t>(row) / 8, in8 = row % 8;
  if (descriptor >> 62 == 0)
    return field(0) + row8 * field(32) + in8 * 16 + chunk * field(16) + rest;
  const std::uint32_t linear = field(0) + row8 * field(32) + in8 * 128 + chunk * 16 + rest;
  return linear ^ ((linear >> 7 & 7u) << 4);
}

// ---- accumulator fragments ----

// Register i of lane of mma m16n8 and, for each eight columns, of a warp's sixteen rows of wgmma.
TML_HOST_DEVICE constexpr int fragment_row(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
TML_HOST_DEVICE constexpr int fragment_column(int lane, int i) {
  return i / 4 * 8 + lane % 4 * 2 + i % 2;
}

}  // namespace tml::cuda
