// Vectors that may be shorter than the tier's.
#pragma once

#include "spec.h"

namespace inception_fast::cpu {
namespace {

template <class T> inline Isa::V read_some(const T *p, int count) {
  return count < Isa::lanes ? Isa::load_some(p, count) : Isa::load(p);
}

template <class T> inline void write_some(T *p, Isa::V v, int count) {
  if (count < Isa::lanes)
    Isa::store_some(p, v, count);
  else
    Isa::store(p, v);
}

} // namespace
} // namespace inception_fast::cpu
