// Eight lanes: AVX2 and FMA.
#pragma once

#include <immintrin.h>

namespace inception_fast::cpu {
namespace {

struct Isa {
  using V = __m256;
  static constexpr int lanes = 8;
  static constexpr int rows = 6;

  static V set(float x) { return _mm256_set1_ps(x); }
  static V zero() { return _mm256_setzero_ps(); }
  static V load(const float *p) { return _mm256_loadu_ps(p); }
  static void store(float *p, V v) { _mm256_storeu_ps(p, v); }
  static __m256i first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static V load_some(const float *p, int count) { return _mm256_maskload_ps(p, first(count)); }
  static void store_some(float *p, V v, int count) { _mm256_maskstore_ps(p, first(count), v); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  // maxps returns its second operand when either is NaN.
  static V relu(V v) { return _mm256_max_ps(zero(), v); }
  static V max_nan(V a, V v) { return _mm256_blendv_ps(_mm256_max_ps(a, v), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
  static V sqrt(V v) { return _mm256_sqrt_ps(v); }
};

} // namespace
} // namespace inception_fast::cpu
