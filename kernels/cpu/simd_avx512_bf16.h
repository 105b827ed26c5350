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
  static void store_both(bf16 *p, V a, V b) { _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a)); }
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
  // Up to NV vectors of pairs, each the same element of `a` and of `b`; zeros from `count` elements on.
  template <int NV> static void store_pairs(float *to, const bf16 *a, const bf16 *b, int count) {
    static_assert(NV == 1 || NV == 2);
    constexpr int most = NV * lanes;
    __mmask32 mask = static_cast<__mmask32>((uint64_t(1) << (count > most ? most : count)) - 1);
    __m512i first = _mm512_maskz_loadu_epi16(mask, a), second = _mm512_maskz_loadu_epi16(mask, b);
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(first, low, second));
    if constexpr (NV == 2) {
      const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
      _mm512_storeu_si512(to + lanes, _mm512_permutex2var_epi16(first, high, second));
    }
  }
  // c + a.second * b.second + a.first * b.first
  static V dot(Pairs a, Pairs b, V c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
};

} // namespace
} // namespace inception_fast::cpu
