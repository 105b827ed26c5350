// Four lanes in the compiler's vector extension: no instruction beyond the baseline of the target.
#pragma once

namespace inception_fast::cpu {
namespace {

struct Isa {
  using V = float __attribute__((vector_size(16)));
  static constexpr int lanes = 4;
  static constexpr int rows = 6;

  static V set(float x) { return V{x, x, x, x}; }
  static V zero() { return V{}; }
  static V load(const float *p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float *p, V v) { __builtin_memcpy(p, &v, sizeof v); }
  static V load_some(const float *p, int count) {
    V v{};
    for (int i = 0; i < count; ++i)
      v[i] = p[i];
    return v;
  }
  static void store_some(float *p, V v, int count) {
    for (int i = 0; i < count; ++i)
      p[i] = v[i];
  }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V relu(V v) { return v < zero() ? zero() : v; }
  static V max_nan(V a, V v) { return ((v > a) | (v != v)) ? v : a; }
  static V sqrt(V v) {
    for (int i = 0; i < lanes; ++i)
      v[i] = __builtin_sqrtf(v[i]);
    return v;
  }
};

} // namespace
} // namespace inception_fast::cpu
