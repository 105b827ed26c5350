#include "amx.h"

#include <cstdint>

#if defined(INCEPTION_FAST_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace inception_fast::cpu {

#if defined(INCEPTION_FAST_X86) && defined(__linux__)

namespace {

struct Leaf {
  uint32_t a = 0, b = 0, c = 0, d = 0;

  Leaf(uint32_t leaf, uint32_t part) { there = __get_cpuid_count(leaf, part, &a, &b, &c, &d) != 0; }
  bool there;
};

bool has(uint32_t word, int bit) { return (word >> bit & 1) != 0; }

// Tiles of the only shape there is so far, in the first palette: 8 of 16 rows of 64 bytes.
bool known_tiles() {
  Leaf palettes(0x1d, 0), first(0x1d, 1);
  return palettes.there && palettes.a >= 1 && first.a >> 16 == 1024 && (first.b & 0xffff) == 64 && first.b >> 16 == 8 &&
         (first.c & 0xffff) == 16;
}

// The register state that the system saves: bits 17 and 18 are the tiles' configuration and data.
bool system_saves_tiles() {
  if (!has(Leaf(1, 0).c, 27)) // OSXSAVE
    return false;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return has(low, 17) && has(low, 18);
}

bool ask_system() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

} // namespace

bool amx_allowed() {
  Leaf features(7, 0);
  constexpr int AMX_BF16 = 22, AMX_TILE = 24;
  return features.there && has(features.d, AMX_BF16) && has(features.d, AMX_TILE) && known_tiles() &&
         system_saves_tiles() && ask_system();
}

#else

bool amx_allowed() { return false; }

#endif

} // namespace inception_fast::cpu
