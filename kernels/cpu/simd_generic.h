// Four or sixteen lanes in the compiler's vector extension: no instruction beyond the baseline of the target.
#pragma once

#include "spec.h"

namespace inception_fast::cpu {
namespace {

template <int Lanes> struct Floats;
template <> struct Floats<4> {
  using V = float __attribute__((vector_size(16)));
};
template <> struct Floats<16> {
  using V = float __attribute__((vector_size(64)));
};

template <int Lanes> struct Generic {
  using V = typename Floats<Lanes>::V;
  static constexpr int lanes = Lanes;
  static constexpr int rows = Lanes > 4 ? 2 : 6;
  static constexpr bool dots = false;

  static V set(float x) { return x - V{}; }
  static V set(bf16 x) { return set(widen(x)); }
  static V zero() { return V{}; }
  static V load(const float *p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static V load(const bf16 *p) { return every<1>(p); }
  static void store(float *p, V v) { __builtin_memcpy(p, &v, sizeof v); }
  static void store(bf16 *p, V v) { store_some(p, v, lanes); }
  static V load_some(const float *p, int count) {
    V v{};
    for (int i = 0; i < count && i < lanes; ++i)
      v[i] = p[i];
    return v;
  }
  static V load_some(const bf16 *p, int count) {
    V v{};
    for (int i = 0; i < count && i < lanes; ++i)
      v[i] = widen(p[i]);
    return v;
  }
  static void store_both(bf16 *p, V a, V b) {
    store(p, a);
    store(p + lanes, b);
  }
  static void store_some(float *p, V v, int count) {
    for (int i = 0; i < count && i < lanes; ++i)
      p[i] = v[i];
  }
  static void store_some(bf16 *p, V v, int count) {
    for (int i = 0; i < count && i < lanes; ++i)
      p[i] = narrow(v[i]);
  }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V at_least(V least, V v) { return v < least ? least : v; }
  static V relu(V v) { return at_least(zero(), v); }
  static V max_nan(V a, V v) { return ((v > a) | (v != v)) ? v : a; }
  static V sqrt(V v) {
    for (int i = 0; i < lanes; ++i)
      v[i] = __builtin_sqrtf(v[i]);
    return v;
  }

  // The first and the second of each of `lanes` pairs of neighbours.
  static V load_first(const bf16 *p) { return every<2>(p); }
  static V load_second(const bf16 *p) { return every<2>(p + 1); }

private:
  template <int step> static V every(const bf16 *p) {
    V v{};
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      v[i] = widen(p[i * step]);
    return v;
  }
  static float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
  // To nearest, ties to even; a NaN stays one.
  static bf16 narrow(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    if (value != value)
      return {static_cast<uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};

} // namespace
} // namespace inception_fast::cpu
