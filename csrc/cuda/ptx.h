// The instructions of sm_90a that CUDA C++ has no name for, one function each. The host versions
// under !__CUDACC__ have the same meaning (csrc/cuda/host/simt.h).
#pragma once

#include "cuda/layout.h"
#include "cuda/simt.h"

#if !defined(__CUDACC__)
#include "core/tensor_core.h"
#endif

namespace tml::cuda {

#if defined(__CUDACC__)

TML_DEVICE std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// ---- programmatic dependent launch ----

// Blocks until the kernels before this one on the stream have finished and their writes are seen.
TML_DEVICE void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
TML_DEVICE void grid_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }

// ---- barriers ----

TML_DEVICE void named_barrier(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}
TML_DEVICE void mbarrier_init(std::uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}
// After the inits, before the block's barrier: the copy engine sees them too.
TML_DEVICE void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
TML_DEVICE void mbarrier_arrive(std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
TML_DEVICE void mbarrier_arrive_expect(std::uint64_t* barrier, std::uint32_t num_bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(num_bytes)
      : "memory");
}
// Until the phase of this parity has completed.
TML_DEVICE void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\n"
      "bra again;\n"
      "done:\n}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Orders this thread's view of ordinary shared-memory accesses with the asynchronous proxy.
TML_DEVICE void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- copies ----

// L2 policy of data that is read once.
TML_DEVICE std::uint64_t evict_first() {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
TML_DEVICE std::uint64_t evict_normal() {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// num_bytes (a multiple of 16) of contiguous global memory; completes on the barrier.
TML_DEVICE void bulk_load(void* shared, const void* global, std::uint32_t num_bytes,
                          std::uint64_t* barrier, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
      "l"(global), "r"(num_bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
// Sixteen bytes, of which those past num_bytes become zero and are not read.
TML_DEVICE void copy16(void* shared, const void* global, int num_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(num_bytes)
               : "memory");
}
// Arrives (one of the barrier's count) once this thread's copies so far are done.
TML_DEVICE void copy_arrive(std::uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
TML_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft>
TML_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// ---- registers ----

template <int kRegisters>
TML_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
TML_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- fragments ----

// Four core tiles; lane l gives the address of row l % 8 of tile l / 8.
TML_DEVICE void load_tiles(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
TML_DEVICE void load_tiles_transposed(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// An 8 x 8 tile of 16-bit elements, a pair of a row in each lane, transposed across the warp.
TML_DEVICE std::uint32_t transpose_tile(std::uint32_t pair) {
  std::uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}
// d += a b, m16n8k16.
TML_DEVICE void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                    std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Two fp32 to bf16, to nearest even: low in the lower half. NaN becomes 0x7fff.
TML_DEVICE std::uint32_t pack_bf16(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

#else

inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(static_cast<const unsigned char*>(p) - simt::shared());
}
inline void grid_wait() {}
inline void grid_launch_dependents() {}
inline void named_barrier(int id, int num_threads) {
  simt::barrier(id, static_cast<unsigned>(num_threads));
}

struct Mbarrier {
  std::uint16_t count;
  std::int16_t pending;
  std::int32_t bytes_and_phase;  // 2 * bytes still to come + phase
};
inline void mbarrier_settle(Mbarrier* b) {
  if (b->pending != 0 || b->bytes_and_phase >> 1 != 0) return;
  b->pending = static_cast<std::int16_t>(b->count);
  b->bytes_and_phase ^= 1;
  simt::progress();
}
inline void mbarrier_init(std::uint64_t* barrier, int count) {
  const Mbarrier b{static_cast<std::uint16_t>(count), static_cast<std::int16_t>(count), 0};
  std::memcpy(barrier, &b, sizeof(b));
}
inline void mbarrier_init_fence() {}
inline void mbarrier_update(std::uint64_t* barrier, int arrivals, std::int32_t bytes) {
  Mbarrier b;
  std::memcpy(&b, barrier, sizeof(b));
  b.pending = static_cast<std::int16_t>(b.pending - arrivals);
  b.bytes_and_phase += 2 * bytes;
  mbarrier_settle(&b);
  std::memcpy(barrier, &b, sizeof(b));
}
inline void mbarrier_arrive(std::uint64_t* barrier) { mbarrier_update(barrier, 1, 0); }
inline void mbarrier_arrive_expect(std::uint64_t* barrier, std::uint32_t num_bytes) {
  mbarrier_update(barrier, 1, static_cast<std::int32_t>(num_bytes));
}
inline void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  Mbarrier b;
  std::memcpy(&b, barrier, sizeof(b));
  while (static_cast<std::uint32_t>(b.bytes_and_phase & 1) == parity) {
    simt::yield();
    std::memcpy(&b, barrier, sizeof(b));
  }
}
inline void proxy_fence() {}
inline std::uint64_t evict_first() { return 0; }
inline std::uint64_t evict_normal() { return 0; }
inline void bulk_load(void* shared, const void* global, std::uint32_t num_bytes,
                      std::uint64_t* barrier, std::uint64_t) {
  simt::later([=] {
    std::memcpy(shared, global, num_bytes);
    mbarrier_update(barrier, 0, -static_cast<std::int32_t>(num_bytes));
  });
}
inline void copy16(void* shared, const void* global, int num_bytes) {
  simt::issue(simt::Async::kCopy, [=] {
    unsigned char bytes[16] = {};
    if (num_bytes > 0) std::memcpy(bytes, global, static_cast<std::size_t>(num_bytes));
    std::memcpy(shared, bytes, 16);
  });
}
inline void copy_arrive(std::uint64_t* barrier) {
  simt::after_copies([barrier] { mbarrier_update(barrier, 1, 0); });
}
inline void copy_commit() { simt::commit(simt::Async::kCopy); }
template <int kGroupsLeft>
void copy_wait() {
  simt::wait(simt::Async::kCopy, kGroupsLeft);
}
template <int kRegisters>
void raise_registers() {}
template <int kRegisters>
void lower_registers() {}

inline std::uint16_t tile_element(const std::uint64_t* rows, int tile, int row, int column) {
  std::uint16_t value;
  std::memcpy(&value, reinterpret_cast<const unsigned char*>(rows[tile * 8 + row]) + column * 2, 2);
  return value;
}
inline void load_tiles(std::uint32_t (&r)[4], const void* row) {
  const std::uint64_t* rows = simt::exchange(reinterpret_cast<std::uint64_t>(row));
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int i = 0; i < 4; ++i)
    r[i] = tile_element(rows, i, lane / 4, lane % 4 * 2) |
           static_cast<std::uint32_t>(tile_element(rows, i, lane / 4, lane % 4 * 2 + 1)) << 16;
}
inline void load_tiles_transposed(std::uint32_t (&r)[4], const void* row) {
  const std::uint64_t* rows = simt::exchange(reinterpret_cast<std::uint64_t>(row));
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int i = 0; i < 4; ++i)
    r[i] = tile_element(rows, i, lane % 4 * 2, lane / 4) |
           static_cast<std::uint32_t>(tile_element(rows, i, lane % 4 * 2 + 1, lane / 4)) << 16;
}
inline std::uint32_t transpose_tile(std::uint32_t pair) {
  const std::uint64_t* words = simt::exchange(pair);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto element = [&](int row, int column) {
    return static_cast<std::uint32_t>(words[row * 4 + column / 2] >> (column % 2 * 16)) & 0xffffu;
  };
  return element(lane % 4 * 2, lane / 4) | element(lane % 4 * 2 + 1, lane / 4) << 16;
}
inline void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  std::uint64_t words[3][32];
  const std::uint64_t own[3] = {a[0] | std::uint64_t{a[1]} << 32, a[2] | std::uint64_t{a[3]} << 32,
                                b0 | std::uint64_t{b1} << 32};
  for (int i = 0; i < 3; ++i) std::memcpy(words[i], simt::exchange(own[i]), sizeof(words[i]));
  for (int i = 0; i < 4; ++i) {
    const int row = fragment_row(lane, i), column = fragment_column(lane, i);
    std::uint16_t x[kMmaDepth], y[kMmaDepth];
    for (int k = 0; k < kMmaDepth; ++k) {
      // a: registers (row, k), (row + 8, k), (row, k + 8), (row + 8, k + 8); b: k, k + 8.
      const std::uint64_t from_a = words[k / 8][row % 8 * 4 + k % 8 / 2] >> (row / 8 * 32);
      const std::uint64_t from_b = words[2][column * 4 + k % 8 / 2] >> (k / 8 * 32);
      x[k] = static_cast<std::uint16_t>(from_a >> (k % 2 * 16));
      y[k] = static_cast<std::uint16_t>(from_b >> (k % 2 * 16));
    }
    d[i] = mma_step(x, y, d[i]);
  }
}
inline std::uint32_t round_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fffu;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline std::uint32_t pack_bf16(float low, float high) {
  return round_bf16(low) | round_bf16(high) << 16;
}

#endif

}  // namespace tml::cuda
