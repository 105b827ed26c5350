// Sixteen lanes: AVX-512 F.
#pragma once

#include <immintrin.h>

namespace inception_fast::cpu {
namespace {

struct Isa {
  using V = __m512;
  static constexpr int lanes = 16;
  static constexpr int rows = 14;

  static V set(float x) { return _mm512_set1_ps(x); }
  static V zero() { return _mm512_setzero_ps(); }
  static V load(const float *p) { return _mm512_loadu_ps(p); }
  static void store(float *p, V v) { _mm512_storeu_ps(p, v); }
  static __mmask16 first(int count) { return static_cast<__mmask16>((1u << (count > 16 ? 16 : count)) - 1); }
  static V load_some(const float *p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
  static void store_some(float *p, V v, int count) { _mm512_mask_storeu_ps(p, first(count), v); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  // vmaxps returns its second operand when either is NaN.
  static V relu(V v) { return _mm512_max_ps(zero(), v); }
  static V max_nan(V a, V v) {
    return _mm512_mask_mov_ps(_mm512_max_ps(a, v), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
  static V sqrt(V v) { return _mm512_sqrt_ps(v); }
};

} // namespace
} // namespace inception_fast::cpu
