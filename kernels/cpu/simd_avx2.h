// Eight lanes: AVX2 and FMA.
#pragma once

#include "spec.h"

#include <immintrin.h>

namespace inception_fast::cpu {
namespace {

struct Isa {
  using V = __m256;
  static constexpr int lanes = 8;
  static constexpr int rows = 6;
  static constexpr bool dots = false;

  static V set(float x) { return _mm256_set1_ps(x); }
  static V zero() { return _mm256_setzero_ps(); }
  static V load(const float *p) { return _mm256_loadu_ps(p); }
  static V load(const bf16 *p) { return widen(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p))); }
  static void store(float *p, V v) { _mm256_storeu_ps(p, v); }
  static void store(bf16 *p, V v) { _mm_storeu_si128((__m128i *)p, narrow(v)); }
  static __m256i first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static V load_some(const float *p, int count) { return _mm256_maskload_ps(p, first(count)); }
  static V load_some(const bf16 *p, int count) {
    alignas(16) bf16 part[lanes] = {};
    __builtin_memcpy(part, p, sizeof(bf16) * (count > lanes ? lanes : count));
    return load(part);
  }
  static void store_some(float *p, V v, int count) { _mm256_maskstore_ps(p, first(count), v); }
  static void store_some(bf16 *p, V v, int count) {
    alignas(16) bf16 part[lanes];
    store(part, v);
    __builtin_memcpy(p, part, sizeof(bf16) * (count > lanes ? lanes : count));
  }
  // Has v in a register here, whatever else wants one.
  __attribute__((always_inline)) static void hold(V &v) { asm("" : "+x"(v)); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  // maxps returns its second operand when either is NaN.
  static V relu(V v) { return _mm256_max_ps(zero(), v); }
  static V max_nan(V a, V v) { return _mm256_blendv_ps(_mm256_max_ps(a, v), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
  static V sqrt(V v) { return _mm256_sqrt_ps(v); }

  // The first and the second of each of 8 pairs of neighbours.
  static V load_first(const bf16 *p) { return widen(_mm256_loadu_si256((const __m256i *)p)); }
  static V load_second(const bf16 *p) {
    __m256i both = _mm256_loadu_si256((const __m256i *)p);
    return _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000))));
  }

private:
  static V widen(__m256i low) { return _mm256_castsi256_ps(_mm256_slli_epi32(low, 16)); }
  // To nearest, ties to even; a NaN stays one.
  static __m128i narrow(V v) {
    __m256i bits = _mm256_castps_si256(v), upper = _mm256_srli_epi32(bits, 16);
    __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    __m256i found = _mm256_blendv_epi8(rounded, quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1));
  }
};

} // namespace
} // namespace inception_fast::cpu
