// The instructions of sm_90a that the kernels use, one function each, without policy. Device code touches the hardware
// through these names and plain C++ alone, so that tests/cuda can put `emulated.h` in their place and run the kernels'
// own source on the CPU.
#pragma once

#include <cstdint>

#include "descriptor.h"
#include "tensor_map.h"

#ifdef INCEPTION_FAST_EMULATED
#include "emulated.h"
#else

#include <cuda.h> // types only: nothing of libcuda is linked
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "memory.cuh"
#include "wgmma.cuh"

namespace inception_fast::hopper {

using TensorMap = CUtensorMap;
using Barrier = uint64_t; // an mbarrier in shared memory

// The block and its parts.

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The block's dynamic shared memory, at a multiple of 1024 bytes: ask the launch for 1024 bytes more than are used.
__device__ __forceinline__ uint8_t *dynamic_shared() {
  extern __shared__ __align__(1024) uint8_t inception_fast_shared[];
  const uint32_t address = shared_address(inception_fast_shared);
  return inception_fast_shared + ((1024 - address % 1024) % 1024);
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }

__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Waits for `threads` threads, a multiple of 32, at barrier `id` (1..15; 0 is sync_block's).
__device__ __forceinline__ void sync_named(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts `threads` towards barrier `id` without waiting there.
__device__ __forceinline__ void arrive_named(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers of each thread of the calling warpgroup from here on, a multiple of 8 in 24..240.
template <int COUNT> __device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT> __device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// A value that is the same in all lanes of the warp, in a form in which the compiler knows it.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

[[noreturn]] __device__ __forceinline__ void fail() {
  asm volatile("trap;");
  __builtin_unreachable();
}

// The cluster and the grid.

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// All threads of all blocks of the cluster; memory operations before the arrival are seen after the wait.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Returns when the grids that this one depends on have ended and their writes are seen; at once when there are none.
// Each thread that reads what they write, or writes what they read, has to wait itself.
__device__ __forceinline__ void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next grid of a programmatic launch start while this one still runs.
__device__ __forceinline__ void grid_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// What one thread of a warp does for all: the whole warp comes here, together, and one thread acts. Of a branch that
// one thread takes the compiler makes a loop over lanes round each copy, with operands that go from registers to
// uniform ones every time: 277 cycles a copy on an H200, and 80 to 130 of a whole warp (benchmarks/gpu/rates.cu).
#define ONE_LANE(INSTRUCTION) "{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n@one " INSTRUCTION "\n}\n"

// Barriers that count arrivals and bytes.

__device__ __forceinline__ void barrier_init(Barrier *barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the cluster and to the TMA unit; a block or cluster barrier has to follow.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival, and `bytes` more to come in this phase; by a whole warp.
__device__ __forceinline__ void barrier_expect(Barrier *barrier, uint32_t bytes) {
  asm volatile(ONE_LANE("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;")::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier *barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives at the barrier that block `rank` of the cluster has at the same place. The release has the scope of the
// block, as in barrier_arrive: what it orders are reads of shared memory by wgmma, which wgmma_wait has ended, before
// the other block's copies over them, and no store has to be seen there. Scope .cluster would be a MEMBAR.ALL.GPU an
// arrival.
__device__ __forceinline__ void barrier_arrive_remote(Barrier *barrier, uint32_t rank) {
  asm volatile("{\n.reg .b32 remote;\n"
               "mapa.shared::cluster.u32 remote, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(shared_address(barrier)),
               "r"(rank)
               : "memory");
}

// Acquires at the scope of the block: a copy's bytes are seen by whoever saw its phase end, multicast or not, and
// stores of another block are never read. Scope .cluster would empty the level 1 cache (CCTL.IVALL) at each wait.
__device__ __forceinline__ bool barrier_try(Barrier *barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\n"
               "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
               "selp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
}

// Waits for the end of the phase of this parity; a barrier is created in phase 0, so parity 1 passes at first. A try
// suspends the thread for a time that the hardware chooses, and a pipeline that hangs is worse than one that fails:
// after about four seconds the kernel traps.
__device__ __forceinline__ void barrier_wait(Barrier *barrier, uint32_t parity) {
  if (barrier_try(barrier, parity))
    return;
  uint64_t start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  while (!barrier_try(barrier, parity)) {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (now - start > 4000000000ull)
      fail();
  }
}

// The device's clock, the same on all multiprocessors.
__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Orders the generic proxy's accesses to shared memory before those of TMA and wgmma.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same for global memory: between own stores and whatever other blocks copy, or between what others stored and own
// copies.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Waits, by a whole warp, until the counter of each lane that has one has reached its `value`. What their
// counter_release ordered before it is seen after this. Traps after about four seconds, as barrier_wait does. All lanes
// leave together, so that the compiler knows them together in what follows.
__device__ __forceinline__ void wait_for_counts(const uint32_t *counter, uint32_t value) {
  const auto reached = [&] { return __all_sync(0xffffffffu, !counter || load_acquire(counter) >= value); };
  if (!reached()) {
    const uint64_t start = nanoseconds();
    while (!reached())
      if (nanoseconds() - start > 4000000000ull)
        fail();
  }
  sync_warp();
}

// Copies by the TMA unit. Those to shared memory are asked for by a whole warp.

__device__ __forceinline__ void prefetch_map(const TensorMap *map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// `bytes` of global memory, a multiple of 16 as both addresses are; `barrier` counts them.
__device__ __forceinline__ void bulk_load(void *to, const void *from, uint32_t bytes, Barrier *barrier) {
  asm volatile(ONE_LANE("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];")::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

#define LOAD "cp.async.bulk.tensor."
#define INTO ".shared::cluster.global"
#define DONE ".mbarrier::complete_tx::bytes"
#define TARGET "r"(shared_address(to)), "l"(map), "r"(shared_address(barrier))

// A box of the map whose first element has these coordinates, innermost first; `barrier` counts its bytes.
__device__ __forceinline__ void tma_load(void *to, const TensorMap *map, Barrier *barrier, int c0, int c1) {
  asm volatile(ONE_LANE(LOAD "2d" INTO ".tile" DONE " [%0], [%1, {%3, %4}], [%2];")::TARGET, "r"(c0), "r"(c1)
               : "memory");
}

__device__ __forceinline__ void tma_load(void *to, const TensorMap *map, Barrier *barrier, int c0, int c1, int c2) {
  asm volatile(ONE_LANE(LOAD "3d" INTO ".tile" DONE " [%0], [%1, {%3, %4, %5}], [%2];")::TARGET, "r"(c0), "r"(c1),
               "r"(c2)
               : "memory");
}

__device__ __forceinline__ void tma_load(void *to, const TensorMap *map, Barrier *barrier, int c0, int c1, int c2,
                                         int c3) {
  asm volatile(ONE_LANE(LOAD "4d" INTO ".tile" DONE " [%0], [%1, {%3, %4, %5, %6}], [%2];")::TARGET, "r"(c0), "r"(c1),
               "r"(c2), "r"(c3)
               : "memory");
}

__device__ __forceinline__ void tma_load(void *to, const TensorMap *map, Barrier *barrier, int c0, int c1, int c2,
                                         int c3, int c4) {
  asm volatile(ONE_LANE(LOAD "5d" INTO ".tile" DONE " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];")::TARGET, "r"(c0),
               "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}

// The same box to the same place of every block of the cluster whose bit is in `blocks`, and to its barrier.
__device__ __forceinline__ void tma_load_multicast(void *to, const TensorMap *map, Barrier *barrier, uint16_t blocks,
                                                   int c0, int c1, int c2) {
  asm volatile(ONE_LANE(LOAD "3d" INTO ".tile" DONE ".multicast::cluster [%0], [%1, {%4, %5, %6}], [%2], %3;")::TARGET,
               "h"(blocks), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}

// `pixels` windows of an im2col map from the one whose corner is (w, h) of image n, at tap (tap_w, tap_h) of each.
__device__ __forceinline__ void tma_load_im2col(void *to, const TensorMap *map, Barrier *barrier, int c, int w, int h,
                                                int n, uint16_t tap_w, uint16_t tap_h) {
  asm volatile(ONE_LANE(LOAD "4d" INTO ".im2col" DONE " [%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};")::TARGET, "r"(c),
               "r"(w), "r"(h), "r"(n), "h"(tap_w), "h"(tap_h)
               : "memory");
}

__device__ __forceinline__ void tma_load_im2col_multicast(void *to, const TensorMap *map, Barrier *barrier,
                                                          uint16_t blocks, int c, int w, int h, int n, uint16_t tap_w,
                                                          uint16_t tap_h) {
  asm volatile(ONE_LANE(LOAD "4d" INTO ".im2col" DONE
                             ".multicast::cluster [%0], [%1, {%4, %5, %6, %7}], [%2], {%8, %9}, %3;")::TARGET,
               "h"(blocks), "r"(c), "r"(w), "r"(h), "r"(n), "h"(tap_w), "h"(tap_h)
               : "memory");
}

// A box of a tiled map into the level 2 cache, by a whole warp; nobody is told when it is there.
__device__ __forceinline__ void tma_prefetch(const TensorMap *map, int c0, int c1) {
  asm volatile(ONE_LANE("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];")::"l"(map), "r"(c0), "r"(c1)
               : "memory");
}

__device__ __forceinline__ void tma_prefetch(const TensorMap *map, int c0, int c1, int c2) {
  asm volatile(ONE_LANE("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];")::"l"(map), "r"(c0),
               "r"(c1), "r"(c2)
               : "memory");
}

#undef LOAD
#undef INTO
#undef DONE
#undef TARGET
#undef ONE_LANE

// Stores follow fence_async_shared and a barrier of the writing threads; one thread stores, commits and waits.
__device__ __forceinline__ void tma_store(const TensorMap *map, const void *from, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// At most PENDING groups of stores still read shared memory.
template <int PENDING> __device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

template <int PENDING> __device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Matrix products.

// Orders earlier accesses to accumulators and shared memory before the wgmmas that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// At most PENDING committed groups still run; the warp's older ones have written D and read shared memory.
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// d = a * b^T + (accumulate ? d : 0) by the calling warpgroup; wgmma.cuh has the layout of d.
template <int N, class T>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], Descriptor a, Descriptor b, int accumulate) {
  Wgmma<N, T>::run(d, a.bits(), b.bits(), accumulate);
}

// Products write their registers after the instruction, of which the compiler knows nothing: behind the wait for them,
// this keeps what reads the sums from being moved ahead of it.
template <int N> __device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    asm volatile("" : "+f"(d[i])::"memory");
}

} // namespace inception_fast::hopper

#endif // INCEPTION_FAST_EMULATED

namespace inception_fast::hopper {

// About the compiler, not the hardware: addresses of an epilogue are cheap to make and many, and this keeps them from
// being made ahead of the loops, where each would hold a register.
__device__ __forceinline__ int renewed(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

} // namespace inception_fast::hopper
