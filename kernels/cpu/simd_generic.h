// Four or sixteen lanes in the compiler's vector extension: no instruction beyond the baseline of the target.
#pragma once

#include "spec.h"

namespace inception_fast::cpu {
namespace {

template <int Lanes> struct VectorTypes;
template <> struct VectorTypes<4> {
  using Floats = float __attribute__((vector_size(16)));
  using Bits = uint32_t __attribute__((vector_size(16)));
  using Halves = uint16_t __attribute__((vector_size(8)));
};
template <> struct VectorTypes<16> {
  using Floats = float __attribute__((vector_size(64)));
  using Bits = uint32_t __attribute__((vector_size(64)));
  using Halves = uint16_t __attribute__((vector_size(32)));
};

template <int Lanes> struct Generic {
  using V = typename VectorTypes<Lanes>::Floats;
  static constexpr int lanes = Lanes;
  static constexpr int rows = Lanes > 4 ? 2 : 6;
  static constexpr bool dots = false;

  static V set(float x) { return x - V{}; }
  static V set(bf16 x) { return set(widen(x)); }
  static V zero() { return V{}; }
  static V load(const float *p) { return get<V>(p); }
  static V load(const bf16 *p) { return V(__builtin_convertvector(get<Halves>(p), Bits) << 16); }
  static void store(float *p, V v) { __builtin_memcpy(p, &v, sizeof v); }
  static void store(bf16 *p, V v) {
    Halves halves = narrow(v);
    __builtin_memcpy(p, &halves, sizeof halves);
  }
  static void hold(V &) {}
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
    Halves halves = narrow(v);
    for (int i = 0; i < count && i < lanes; ++i)
      p[i].bits = halves[i];
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
  static V load_first(const bf16 *p) { return V(get<Bits>(p) << 16); }
  static V load_second(const bf16 *p) { return V(get<Bits>(p) & 0xffff0000u); }

private:
  using Bits = typename VectorTypes<Lanes>::Bits;
  using Halves = typename VectorTypes<Lanes>::Halves;

  template <class To> static To get(const void *p) {
    To to;
    __builtin_memcpy(&to, p, sizeof to);
    return to;
  }
  static float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
  // To nearest, ties to even; a NaN stays one.
  static Halves narrow(V v) {
    Bits bits = Bits(v), upper = bits >> 16;
    Bits rounded = (bits + 0x7fff + (upper & 1)) >> 16;
    return __builtin_convertvector(v != v ? upper | 0x40 : rounded, Halves);
  }
};

} // namespace
} // namespace inception_fast::cpu
