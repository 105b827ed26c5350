// Single values of any type as floats.
#pragma once

#include "spec.h"

namespace inception_fast::cpu {
namespace {

inline float as_float(float x) { return x; }
inline float as_float(uint8_t x) { return x; }
inline float as_float(bf16 x) {
  float value;
  uint32_t bits = uint32_t(x.bits) << 16;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

} // namespace
} // namespace inception_fast::cpu
