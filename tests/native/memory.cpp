#include "memory.h"

#include <cmath>
#include <new>

#include <sys/mman.h>
#include <unistd.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace native_driver {

Guarded::Guarded(size_t bytes, bool at_end) : bytes_(bytes) {
  size_t page = sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
  length_ = room + 2 * page;
  void *pages = mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED)
    throw std::bad_alloc();
  pages_ = static_cast<unsigned char *>(pages);
  if (room > 0 && mprotect(pages_ + page, room, PROT_READ | PROT_WRITE) != 0)
    throw std::bad_alloc();
  for (size_t i = 0; i < room; i += sizeof POISON)
    std::memcpy(pages_ + page + i, &POISON, sizeof POISON);
  data_ = pages_ + page + (at_end ? room - bytes : 0);
}

Guarded::~Guarded() { munmap(pages_, length_); }

void forbid([[maybe_unused]] const unsigned char *from, [[maybe_unused]] int64_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(from, bytes);
#endif
}

void allow([[maybe_unused]] const unsigned char *from, [[maybe_unused]] int64_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(from, bytes);
#endif
}

static float widened(uint16_t half) {
  uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float get(Type type, const void *base, int64_t index) {
  const unsigned char *at = static_cast<const unsigned char *>(base) + index * size_of(type);
  if (type == Type::uint8)
    return *at;
  if (type == Type::bfloat16) {
    uint16_t half;
    std::memcpy(&half, at, sizeof half);
    return widened(half);
  }
  float value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

void put(Type type, void *base, int64_t index, float value) {
  unsigned char *at = static_cast<unsigned char *>(base) + index * size_of(type);
  if (type == Type::uint8) {
    *at = static_cast<unsigned char>(value);
  } else if (type == Type::float32) {
    std::memcpy(at, &value, sizeof value);
  } else {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    uint32_t low = bits & 0xffff, half = bits >> 16;
    if (std::isnan(value))
      half = 0x7fe0; // not a half of POISON
    else if (low > 0x8000 || (low == 0x8000 && half % 2 == 1))
      ++half;
    uint16_t stored = static_cast<uint16_t>(half);
    std::memcpy(at, &stored, sizeof stored);
  }
}

static bool alike(float found, float truth) { return found == truth || (std::isnan(found) && std::isnan(truth)); }

std::string difference(const unsigned char *found, const unsigned char *truth, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 2) {
    if (std::memcmp(found + i, truth + i, 2) == 0)
      continue;
    size_t word = i / 4 * 4;
    bool whole = word + 4 <= bytes, poison = whole && std::memcmp(truth + word, &POISON, sizeof POISON) == 0;
    bool as_float = whole && alike(get(Type::float32, found + word, 0), get(Type::float32, truth + word, 0));
    bool as_half = alike(get(Type::bfloat16, found + i, 0), get(Type::bfloat16, truth + i, 0));
    if (poison || !(as_float || as_half)) {
      auto shown = [&](const unsigned char *p) {
        return (whole ? std::to_string(get(Type::float32, p + word, 0)) : "") + " (as bfloat16 " +
               std::to_string(get(Type::bfloat16, p + i, 0)) + ")";
      };
      return "byte " + std::to_string(i) + " holds " + shown(found) + ", must be " +
             (poison ? "left alone" : shown(truth));
    }
  }
  return "";
}

} // namespace native_driver
