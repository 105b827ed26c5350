// The arithmetic that a core can do at most: products and sums on registers, with nothing to wait for.
#pragma once

#include "spec.h"

namespace inception_fast::cpu {
namespace {

// Enough independent sums to hide the latency of a product, few enough to stay in registers.
constexpr int PEAK_SUMS = Isa::lanes == 16 ? 24 : 12;

template <class I = Isa> inline float peak_float32(int64_t rounds) {
  typename I::V sums[PEAK_SUMS], a = I::set(1e-9f), b = I::set(1.0f);
  for (typename I::V &sum : sums)
    sum = I::zero();
  for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 24
    for (typename I::V &sum : sums)
      sum = I::fma(a, b, sum);
  for (typename I::V &sum : sums)
    a = a + sum;
  float lanes[I::lanes];
  I::store(lanes, a);
  return lanes[0];
}

template <class I = Isa> inline float peak_bfloat16(int64_t rounds) {
  if constexpr (I::dots) {
    const bf16 pair[2] = {{0x3000}, {0x3f80}};
    typename I::V sums[PEAK_SUMS];
    typename I::Pairs a = I::set_pair(pair);
    for (typename I::V &sum : sums)
      sum = I::zero();
    for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 24
      for (typename I::V &sum : sums)
        sum = I::dot(a, a, sum);
    typename I::V total = I::zero();
    for (typename I::V &sum : sums)
      total = total + sum;
    float lanes[I::lanes];
    I::store(lanes, total);
    return lanes[0];
  }
  return peak_float32<I>(rounds); // widened pairs cost what floats cost
}

// Runs `rounds` of the largest rate of products on operands of a type. Returns the multiply-adds of a round; `sink`
// takes a result, so that the work is done.
int64_t peak(Type type, int64_t rounds, float *sink) {
  bool half = type == Type::bfloat16;
  *sink = half ? peak_bfloat16(rounds) : peak_float32(rounds);
  return int64_t(PEAK_SUMS) * Isa::lanes * (half && Isa::dots ? 2 : 1);
}

} // namespace
} // namespace inception_fast::cpu
