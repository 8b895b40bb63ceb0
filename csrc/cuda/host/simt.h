// CUDA threads on the host: a kernel file compiled as plain C++ runs here, every thread a fiber of
// one operating-system thread, with barriers, shuffles, mbarriers, asynchronous copies and tensor
// cores (core/tensor_core.h) as a device has them. Asynchronous work is done as late as its wait
// allows, so a missing wait shows. Not shown: missing proxy fences, weak memory order, timing.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define TML_DEVICE inline
#define TML_KERNEL(threads, blocks_per_sm) inline void
#define TML_GRID_CONSTANT
#define __restrict__

namespace tml::simt {

struct Dim {
  unsigned x = 0;
};
// Of the fiber that runs now.
extern Dim threadIdx, blockIdx, blockDim, gridDim;

// Runs body() once per thread of the grid, `resident` blocks at a time. Throws std::runtime_error
// when no fiber can go on.
void launch(unsigned grid, unsigned threads, std::size_t shared_bytes,
            const std::function<void()>& body, unsigned resident = 4);

void yield();             // until other fibers have had a turn
void progress();          // something happened that a waiting fiber may wait for
unsigned char* shared();  // dynamic shared memory of the block, 1024-byte aligned
void barrier(int id, unsigned count);
// All 32 lanes hand in a word and may read the others' until the next exchange.
const std::uint64_t* exchange(std::uint64_t value);

// Asynchronous work of the calling thread, in order.
enum class Async { kCopy, kMma };
void issue(Async kind, std::function<void()> work);
void commit(Async kind);
void wait(Async kind, int groups_left);
// Work of the block that nobody waits for by name: one item is done each time all fibers waited.
void later(std::function<void()> work);
// cp.async.mbarrier.arrive: the copies issued so far, then arrive().
void after_copies(std::function<void()> arrive);

}  // namespace tml::simt

namespace tml::cuda {

using simt::blockDim;
using simt::blockIdx;
using simt::gridDim;
using simt::threadIdx;

inline void __syncthreads() { simt::barrier(0, blockDim.x); }
inline void __syncwarp() { simt::exchange(0); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  std::uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  word = simt::exchange(word)[(threadIdx.x % 32) ^ static_cast<unsigned>(mask)];
  std::memcpy(&value, &word, sizeof(T));
  return value;
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  std::uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  word = simt::exchange(word)[lane];
  std::memcpy(&value, &word, sizeof(T));
  return value;
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  const std::uint64_t* words = simt::exchange(predicate);
  unsigned mask = 0;
  for (int lane = 0; lane < 32; ++lane) mask |= static_cast<unsigned>(words[lane]) << lane;
  return mask;
}
inline int atomicAdd(int* target, int value) {
  const int before = *target;
  *target += value;
  return before;
}
inline unsigned atomicOr(unsigned* target, unsigned bits) {
  const unsigned before = *target;
  *target |= bits;
  return before;
}
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

}  // namespace tml::cuda
