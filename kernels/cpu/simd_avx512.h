// Sixteen lanes: AVX-512 F.
#pragma once

#include "spec.h"

#include <immintrin.h>

namespace inception_fast::cpu {
namespace {

struct Avx512 {
  using V = __m512;
  static constexpr int lanes = 16;
  static constexpr int rows = 14;
  static constexpr bool dots = false;

  static V set(float x) { return _mm512_set1_ps(x); }
  static V zero() { return _mm512_setzero_ps(); }
  static V load(const float *p) { return _mm512_loadu_ps(p); }
  static V load(const bf16 *p) { return widen(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p))); }
  static void store(float *p, V v) { _mm512_storeu_ps(p, v); }
  static void store(bf16 *p, V v) { _mm256_storeu_si256((__m256i *)p, narrow(v)); }
  static __mmask16 first(int count) { return static_cast<__mmask16>((1u << (count > 16 ? 16 : count)) - 1); }
  static V load_some(const float *p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
  static V load_some(const bf16 *p, int count) {
    alignas(32) bf16 part[lanes] = {};
    __builtin_memcpy(part, p, sizeof(bf16) * (count > lanes ? lanes : count));
    return load(part);
  }
  static void store_some(float *p, V v, int count) { _mm512_mask_storeu_ps(p, first(count), v); }
  static void store_some(bf16 *p, V v, int count) {
    _mm512_mask_cvtepi32_storeu_epi16(p, first(count), _mm512_cvtepu16_epi32(narrow(v)));
  }
  // Has v in a register here, whatever else wants one.
  __attribute__((always_inline)) static void hold(V &v) { asm("" : "+v"(v)); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  // vmaxps returns its second operand when either is NaN.
  static V at_least(V least, V v) { return _mm512_max_ps(least, v); }
  static V relu(V v) { return at_least(zero(), v); }
  static V max_nan(V a, V v) {
    return _mm512_mask_mov_ps(_mm512_max_ps(a, v), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
  static V sqrt(V v) { return _mm512_sqrt_ps(v); }

  // The first and the second of each of 16 pairs of neighbours.
  static V load_first(const bf16 *p) { return widen(_mm512_loadu_si512(p)); }
  static V load_second(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(0xffff0000))));
  }

private:
  static V widen(__m512i low) { return _mm512_castsi512_ps(_mm512_slli_epi32(low, 16)); }
  // To nearest, ties to even; a NaN stays one.
  static __m256i narrow(V v) {
    __m512i bits = _mm512_castps_si512(v), upper = _mm512_srli_epi32(bits, 16);
    __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __m512i quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet));
  }
};

} // namespace
} // namespace inception_fast::cpu
