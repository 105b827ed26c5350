// Memory that shows every access it should not have seen.
#pragma once

#include "plan.h"

#include <cstring>
#include <string>

namespace native_driver {

using namespace inception_fast::cpu;

constexpr uint32_t POISON = 0x7fc0dead; // a NaN: reading it spoils the result, overwriting it changes the bits
constexpr int64_t GUARD = 256;          // bytes of poison round every buffer of an arena

// Bytes between two pages without access, right against the one behind or the one before. Full of poison at first.
class Guarded {
public:
  Guarded(size_t bytes, bool at_end);
  ~Guarded();
  Guarded(const Guarded &) = delete;
  Guarded &operator=(const Guarded &) = delete;
  unsigned char *data() const { return data_; }
  size_t bytes() const { return bytes_; }

private:
  unsigned char *pages_, *data_;
  size_t length_, bytes_;
};

// Takes bytes from the program as far as the address sanitizer goes, where the build has it.
void forbid(const unsigned char *from, int64_t bytes);
void allow(const unsigned char *from, int64_t bytes);

inline int64_t size_of(Type type) { return type == Type::float32 ? 4 : type == Type::bfloat16 ? 2 : 1; }

// One element, and what is stored of a value: bfloat16 to nearest, ties to even.
float get(Type type, const void *base, int64_t index);
void put(Type type, void *base, int64_t index, float value);

// Empty when the bytes are the same, a NaN for a NaN and a zero for a zero. Poison must be poison.
std::string difference(const unsigned char *found, const unsigned char *truth, size_t bytes);

} // namespace native_driver
