// The part of CUDA's language and types that the kernels of kernels/cuda use, for a host compiler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace inception_fast::emulated {
inline uint32_t bits_of(float v) {
  uint32_t b;
  std::memcpy(&b, &v, 4);
  return b;
}
inline float float_of(uint32_t b) {
  float v;
  std::memcpy(&v, &b, 4);
  return v;
}

// To the nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float v) {
  uint32_t b = bits_of(v);
  if ((b & 0x7fffffff) > 0x7f800000)
    return uint16_t(b >> 16 | 0x40);
  return uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
inline float from_bfloat16(uint16_t h) { return float_of(uint32_t(h) << 16); }

inline uint16_t to_half(float v) {
  uint32_t b = bits_of(v), sign = b >> 16 & 0x8000, a = b & 0x7fffffff;
  if (a > 0x7f800000)
    return uint16_t(sign | 0x7e00);
  if (a >= 0x477ff000) // 65520 and above round to infinity
    return uint16_t(sign | 0x7c00);
  if (a < 0x38800000) { // subnormal: a multiple of 2^-24; nearbyint rounds ties to even
    return uint16_t(sign | uint32_t(std::nearbyint(std::fabs(double(v)) * 16777216.0)));
  }
  a += 0xfff + (a >> 13 & 1);
  return uint16_t(sign | ((a - 0x38000000) >> 13));
}
inline float from_half(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023;
  if (e == 0)
    return float_of(sign | bits_of(float(m) / 16777216.0f));
  return float_of(sign | (e == 31 ? 0x7f800000 | m << 13 : ((e + 112) << 23 | m << 13)));
}
} // namespace inception_fast::emulated

struct __nv_bfloat16 {
  uint16_t x;
};
struct __half {
  uint16_t x;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline __nv_bfloat16 __float2bfloat16_rn(float v) { return {inception_fast::emulated::to_bfloat16(v)}; }
inline __nv_bfloat16 __float2bfloat16(float v) { return __float2bfloat16_rn(v); }
inline float __bfloat162float(__nv_bfloat16 v) { return inception_fast::emulated::from_bfloat16(v.x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline __half __float2half_rn(float v) { return {inception_fast::emulated::to_half(v)}; }
inline __half __float2half(float v) { return __float2half_rn(v); }
inline float __half2float(__half v) { return inception_fast::emulated::from_half(v.x); }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline float __int_as_float(int v) { return inception_fast::emulated::float_of(uint32_t(v)); }
inline float __uint_as_float(unsigned v) { return inception_fast::emulated::float_of(v); }
inline unsigned __float_as_uint(float v) { return inception_fast::emulated::bits_of(v); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
using std::fmaxf;
using std::fminf;

using cudaStream_t = void *;

// Of the thread that runs; set whenever the emulator changes threads.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
