// Sixteen lanes with products of pairs of bfloat16: AVX-512 F, BW, VL and BF16.
#pragma once

#include "simd_avx512.h"

namespace inception_fast::cpu {
namespace {

struct Avx512Bf16 : Avx512 {
  static constexpr bool dots = true;
  using Pairs = __m512i;

  using Avx512::load_some;
  using Avx512::store;
  using Avx512::store_some;

  static V load_some(const bf16 *p, int count) {
    __m256i low = _mm256_maskz_loadu_epi16(first(count), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16));
  }
  // Values below the smallest normal become zero.
  static void store(bf16 *p, V v) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(v)); }
  static void store_some(bf16 *p, V v, int count) {
    _mm256_mask_storeu_epi16(p, first(count), (__m256i)_mm512_cvtneps_pbh(v));
  }

  static Pairs load_pairs(const bf16 *p) { return _mm512_loadu_si512(p); }
  static Pairs set_pair(const bf16 *p) {
    int both;
    __builtin_memcpy(&both, p, sizeof both);
    return _mm512_set1_epi32(both);
  }
  static Pairs set_single(const bf16 *p) { return _mm512_set1_epi32(p->bits); }
  // c + a.second * b.second + a.first * b.first
  static V dot(Pairs a, Pairs b, V c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
};

} // namespace
} // namespace inception_fast::cpu
