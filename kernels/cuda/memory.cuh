// Loads and stores of shared and of global memory, 16 bytes where they can be, and the formats of what is stored: names
// of hopper.cuh, which includes this.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace inception_fast::hopper {

// Matrices of 8 x 8 elements of 16 bits: lane i gives the address of row i % 8 of matrix i / 8, and register m of lane
// i holds row i / 4, columns 2 * (i % 4) and the next, of matrix m.
__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(m0), "r"(m1),
               "r"(m2), "r"(m3)
               : "memory");
}

__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t m0, uint32_t m1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(m0), "r"(m1) : "memory");
}

// The same, but register m of lane i holds column i / 4, rows 2 * (i % 4) and the next.
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, uint32_t m0, uint32_t m1, uint32_t m2,
                                                          uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(m0),
               "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ uint32_t load_shared_4(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_shared_16(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

__device__ __forceinline__ void store_shared_16(uint32_t address, float4 value) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(value.x), "f"(value.y), "f"(value.z),
               "f"(value.w)
               : "memory");
}

__device__ __forceinline__ float4 load_shared_floats(uint32_t address) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// An address that was a number is one of global memory: a generic access would wait for those to shared memory, too.
__device__ __forceinline__ uint4 load_global_16(const void *from) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return value;
}

// Begins to bring the 32 bytes at an address into the level 2 cache; nothing waits for it.
__device__ __forceinline__ void prefetch_global(const void *from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)));
}

__device__ __forceinline__ void store_global_16(void *to, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ __forceinline__ void store_global_8(void *to, float2 value) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "f"(value.x), "f"(value.y)
               : "memory");
}

// As store_global_16, without a branch: `where` becomes the instruction's predicate.
__device__ __forceinline__ void store_global_16_if(bool where, void *to, uint4 value) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n"
               "@p st.global.v4.u32 [%1], {%2, %3, %4, %5};\n}\n" ::"r"(static_cast<int>(where)),
               "l"(__cvta_generic_to_global(to)), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// Two floats at an address of memory that nothing writes while the kernel runs.
__device__ __forceinline__ float2 load_constant_8(uint64_t from) {
  float2 value;
  asm volatile("ld.global.nc.v2.f32 {%0, %1}, [%2];"
               : "=f"(value.x), "=f"(value.y)
               : "l"(__cvta_generic_to_global(reinterpret_cast<const void *>(from))));
  return value;
}

// Past the level 1 cache, where what other multiprocessors wrote is not seen.
template <class V> __device__ __forceinline__ V load_device_16(const V *from) { return __ldcg(from); }

// Adds 1 and returns the value before. What the block's threads wrote before a barrier and this is seen by whoever
// reads the new value here, in the order of one thread: release and acquire at the scope of the device.
__device__ __forceinline__ uint32_t counter_add(uint32_t *counter) {
  uint32_t before;
  asm volatile("atom.global.acq_rel.gpu.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// Adds 1. What the block's threads wrote before a barrier and this is seen by whoever acquires the new value.
__device__ __forceinline__ void counter_release(uint32_t *counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter)) : "memory");
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t *counter) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(counter)) : "memory");
  return value;
}

// All bits of each half of 16 bits whose sign is set, none of the other.
__device__ __forceinline__ uint32_t sign_halves(uint32_t pair) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(mask) : "r"(pair));
  return mask;
}

// Two floats rounded to nearest even and packed, `low` in the low half.
template <class T> __device__ __forceinline__ uint32_t pack(float low, float high);

template <> __device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t &>(pair);
}

template <> __device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t &>(pair);
}

template <class T> __device__ __forceinline__ float2 unpack(uint32_t pair);

template <> __device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162 &>(pair));
}

template <> __device__ __forceinline__ float2 unpack<__half>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2 &>(pair));
}

// The larger of each two halves; NaN of either is the result.
template <class T> __device__ __forceinline__ uint32_t larger_pair(uint32_t a, uint32_t b);

template <> __device__ __forceinline__ uint32_t larger_pair<__nv_bfloat16>(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

template <> __device__ __forceinline__ uint32_t larger_pair<__half>(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

} // namespace inception_fast::hopper
