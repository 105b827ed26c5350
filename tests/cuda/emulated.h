// The names of hopper.cuh on the CPU: with -DINCEPTION_FAST_EMULATED a kernel's own source runs against this machine.
//
// Every thread of a cluster is a fiber on one CPU thread. It runs until it waits: at an mbarrier, a named barrier, the
// cluster's barrier, a collective of its warp, or wgmma_wait. Threads come in turn, or by random priorities of warps
// from a seed. What hardware does on its own happens early, as late as it may, or at random:
//   TMA       the target is poison from the issue until the data lands; late means when no thread can run without it.
//   Zero
//             fill, swizzle, im2col walk, multicast, byte counts and alignment are modelled.
//   wgmma     operands are read and accumulators written early, or when a wait needs it; accumulators are poison until
//             then, and must not be touched. Both K-major descriptors are decoded; fragments are those PTX documents.
//   shared memory   starts as NaN. Ordinary stores reach the view of TMA and wgmma at the storing thread's
//             fence_async_shared. A copy over one that neither its thread's nor the copying thread's fence is behind is
//             a fault. Addresses are 32-bit and begin off a multiple of 1024.
//   mbarriers phases, arrivals and bytes; too many arrivals, bytes out of range, use before initialisation or without
//   its
//             fence, and being overwritten are faults.
//   global memory   blocks between forbidden pages; a copy of what a thread stored 16 bytes at a time and has not yet
//             ordered by its fence_async_global is a fault; tensor maps have to lie inside one. Those that a driver
//             says an earlier grid uses are closed to a thread until its grid_wait, which returns at once.
// A launch ends with a reason, in place of a result, on: a fault above, a deadlock (with what each warp waits for), a
// thread that ends with copies, products or arrivals open.
//
// What it cannot see: whether this reading of PTX is what the hardware does (the layout of descriptors without swizzle
// and the corner walk of im2col above all); races that no schedule tried shows; the order of float32 sums inside a
// wgmma; memory ordering weaker than fibers have (a
// warp barrier missing round stmatrix, say); ordinary stores to shared memory that bypass these functions; what
// the compiler makes of the code; speed.
#pragma once

#include "../../kernels/cuda/descriptor.h"
#include "cuda_types.h"
#include "primitives.h"
#include <cstdint>

namespace inception_fast::hopper {

using TensorMap = MapSpec;
using Barrier = uint64_t;

inline uint32_t shared_address(const void *pointer) { return emulated::shared_address(pointer); }
inline uint8_t *dynamic_shared() { return emulated::dynamic_shared(); }
inline void sync_block() { emulated::sync_block(); }
inline void sync_warp() { emulated::sync_warp(); }
inline void sync_named(uint32_t id, uint32_t threads) { emulated::sync_named(id, threads); }
inline void arrive_named(uint32_t id, uint32_t threads) { emulated::arrive_named(id, threads); }
template <int COUNT> inline void fewer_registers() { emulated::change_registers(COUNT); }
template <int COUNT> inline void more_registers() { emulated::change_registers(COUNT); }
template <class V> inline V uniform(V value) { return value; }
[[noreturn]] inline void fail() { emulated::trap(); }

inline uint32_t cluster_rank() { return emulated::cluster_rank(); }
inline uint32_t cluster_size() { return emulated::cluster_size(); }
inline void cluster_arrive() { emulated::cluster_arrive(); }
inline void cluster_wait() { emulated::cluster_wait(); }
inline void grid_wait() { emulated::grid_wait(); }
inline void grid_launch_dependents() {}

inline void barrier_init(Barrier *barrier, uint32_t arrivals) { emulated::barrier_init(barrier, arrivals); }
inline void fence_barrier_init() { emulated::fence_barrier_init(); }
inline void barrier_expect(Barrier *barrier, uint32_t bytes) {
  if (emulated::elected())
    emulated::barrier_expect(barrier, bytes);
}
inline void barrier_arrive(Barrier *barrier) { emulated::barrier_arrive(barrier); }
inline void barrier_arrive_remote(Barrier *barrier, uint32_t rank) { emulated::barrier_arrive_remote(barrier, rank); }
inline bool barrier_try(Barrier *barrier, uint32_t parity) { return emulated::barrier_try(barrier, parity); }
inline void barrier_wait(Barrier *barrier, uint32_t parity) { emulated::barrier_wait(barrier, parity); }
inline void fence_async_shared() { emulated::fence_async_shared(); }

inline uint64_t nanoseconds() { return emulated::switches(); }
inline void fence_async_global() { emulated::fence_async_global(); }
inline void wait_for_counts(const uint32_t *counter, uint32_t value) {
  if (counter)
    emulated::wait_for_count(counter, value);
  emulated::sync_warp();
}

inline void prefetch_map(const TensorMap *) {}

inline void bulk_load(void *to, const void *from, uint32_t bytes, Barrier *barrier) {
  if (emulated::elected())
    emulated::bulk_load(to, from, bytes, barrier);
}

template <class... At> inline void tma_load(void *to, const TensorMap *map, Barrier *barrier, At... at) {
  const int c[] = {at...};
  if (emulated::elected())
    emulated::tma_load(to, *map, barrier, 0, sizeof...(at), c);
}

template <class... At>
inline void tma_load_multicast(void *to, const TensorMap *map, Barrier *barrier, uint16_t blocks, At... at) {
  const int c[] = {at...};
  if (emulated::elected())
    emulated::tma_load(to, *map, barrier, blocks, sizeof...(at), c);
}

template <class... At> inline void tma_prefetch(const TensorMap *map, At... at) {
  const int c[] = {at...};
  if (emulated::elected())
    emulated::tma_prefetch(*map, sizeof...(at), c);
}

inline void tma_load_im2col(void *to, const TensorMap *map, Barrier *barrier, int c, int w, int h, int n,
                            uint16_t tap_w, uint16_t tap_h) {
  if (emulated::elected())
    emulated::tma_load_im2col(to, *map, barrier, 0, {c, w, h, n}, tap_w, tap_h);
}

inline void tma_load_im2col_multicast(void *to, const TensorMap *map, Barrier *barrier, uint16_t blocks, int c, int w,
                                      int h, int n, uint16_t tap_w, uint16_t tap_h) {
  if (emulated::elected())
    emulated::tma_load_im2col(to, *map, barrier, blocks, {c, w, h, n}, tap_w, tap_h);
}

template <class... At> inline void tma_store(const TensorMap *map, const void *from, At... at) {
  const int c[] = {at...};
  emulated::tma_store(*map, from, sizeof...(at), c);
}

inline void tma_store_commit() { emulated::tma_store_commit(); }
template <int PENDING> inline void tma_store_wait_read() { emulated::tma_store_wait(PENDING); }
template <int PENDING> inline void tma_store_wait() { emulated::tma_store_wait(PENDING); }

inline void wgmma_fence() { emulated::wgmma_fence(); }
inline void wgmma_commit() { emulated::wgmma_commit(); }
template <int PENDING> inline void wgmma_wait() { emulated::wgmma_wait(PENDING); }
template <int N> inline void settle(float (&)[N]) {}

template <class T> constexpr Element element_of();
template <> constexpr Element element_of<__nv_bfloat16>() { return Element::bfloat16; }
template <> constexpr Element element_of<__half>() { return Element::float16; }

template <int N, class T> inline void wgmma(float (&d)[N / 2], Descriptor a, Descriptor b, int accumulate) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma takes N = 8..256 in steps of 8");
  emulated::wgmma(N, int(element_of<T>()), d, a.bits(), b.bits(), accumulate != 0);
}

inline void store_matrices(uint32_t address, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  const uint32_t m[] = {m0, m1, m2, m3};
  emulated::store_matrices(address, m, 4, false);
}
inline void store_matrices(uint32_t address, uint32_t m0, uint32_t m1) {
  const uint32_t m[] = {m0, m1};
  emulated::store_matrices(address, m, 2, false);
}
inline void store_matrices_transposed(uint32_t address, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  const uint32_t m[] = {m0, m1, m2, m3};
  emulated::store_matrices(address, m, 4, true);
}

inline uint4 load_shared_16(uint32_t address) {
  uint4 value;
  emulated::load_shared(address, &value, 16);
  return value;
}
inline uint32_t load_shared_4(uint32_t address) {
  uint32_t value;
  emulated::load_shared(address, &value, 4);
  return value;
}
inline void store_shared_16(uint32_t address, uint4 value) { emulated::store_shared(address, &value, 16); }
inline void store_shared_16(uint32_t address, float4 value) { emulated::store_shared(address, &value, 16); }
inline float4 load_shared_floats(uint32_t address) {
  float4 value;
  emulated::load_shared(address, &value, 16);
  return value;
}

inline uint4 load_global_16(const void *from) {
  emulated::check_global(from, 16, "a load");
  return *static_cast<const uint4 *>(from);
}
inline void prefetch_global(const void *from) {
  emulated::check_global(from, 1, "a prefetch");
  emulated::prefetched_global();
}
inline void store_global_16(void *to, uint4 value) {
  emulated::check_global(to, 16, "a store");
  emulated::stored_global(to);
  *static_cast<uint4 *>(to) = value;
}

inline void store_global_8(void *to, float2 value) {
  emulated::check_global(to, 8, "a store");
  *static_cast<float2 *>(to) = value;
}

inline void store_global_16_if(bool where, void *to, uint4 value) {
  if (where)
    store_global_16(to, value);
}
inline float2 load_constant_8(uint64_t from) {
  emulated::check_global(reinterpret_cast<const void *>(from), 8, "a load");
  return *reinterpret_cast<const float2 *>(from);
}

inline uint32_t counter_add(uint32_t *counter) {
  emulated::check_global(counter, 4, "an addition");
  return (*counter)++;
}
inline void counter_release(uint32_t *counter) {
  emulated::check_global(counter, 4, "an addition");
  ++*counter;
}
template <class V> inline V load_device_16(const V *from) {
  static_assert(sizeof(V) == 16, "16 bytes");
  emulated::check_global(from, 16, "a load");
  return *from;
}

inline uint32_t sign_halves(uint32_t pair) {
  return (pair & 0x80000000u ? 0xffff0000u : 0) | (pair & 0x8000u ? 0xffffu : 0);
}

template <class T> uint32_t pack(float low, float high);
template <> inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  return emulated::to_bfloat16(low) | uint32_t(emulated::to_bfloat16(high)) << 16;
}
template <> inline uint32_t pack<__half>(float low, float high) {
  return emulated::to_half(low) | uint32_t(emulated::to_half(high)) << 16;
}
template <class T> float2 unpack(uint32_t pair);
template <> inline float2 unpack<__nv_bfloat16>(uint32_t pair) {
  return {emulated::from_bfloat16(uint16_t(pair)), emulated::from_bfloat16(uint16_t(pair >> 16))};
}
template <> inline float2 unpack<__half>(uint32_t pair) {
  return {emulated::from_half(uint16_t(pair)), emulated::from_half(uint16_t(pair >> 16))};
}
template <class T> uint32_t larger_pair(uint32_t a, uint32_t b) {
  const auto larger = [](float x, float y) { return x != x || x > y ? x : y; };
  const float2 x = unpack<T>(a), y = unpack<T>(b);
  return pack<T>(larger(x.x, y.x), larger(x.y, y.y));
}

} // namespace inception_fast::hopper
