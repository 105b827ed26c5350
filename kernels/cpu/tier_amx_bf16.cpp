// Every kernel, compiled for AVX-512 with BF16 and for AMX with BF16.
#include "simd_avx512_bf16.h"

namespace inception_fast::cpu {
namespace {
using Isa = Avx512Bf16;
}
} // namespace inception_fast::cpu

#include "check_amx.h"
#include "conv_amx.h"
#include "pair.h"
#include "pointwise.h"
#include "pool.h"

namespace inception_fast::cpu {
namespace {

// The tile registers: sums in 0 to 3, x in 4 and 5, w in 6 and 7.
struct Tiles {
  // As the processor reads it: eight tiles of 16 rows of 64 bytes.
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static_assert(sizeof(Config) == 64, "the configuration is 64 bytes");

  // The whole of it is an operand: GCC's intrinsic names 8 bytes, and the stores to the others are dropped.
  static void configure() {
    const Config config;
    __asm__ volatile("ldtilecfg\t%0" : : "m"(config) : "memory");
  }
  static void release() {
    _tile_release();
    fence();
  }
  static void fence() { __asm__ volatile("" : : : "memory"); }

  template <int m, int v> static void zero() {
    if constexpr (m == 0 && v == 0)
      _tile_zero(0);
    else if constexpr (m == 0)
      _tile_zero(1);
    else if constexpr (v == 0)
      _tile_zero(2);
    else
      _tile_zero(3);
  }
  template <int m> static void load_x(const bf16 *p, int64_t pitch) {
    if constexpr (m == 0)
      _tile_loadd(4, p, pitch);
    else
      _tile_loadd(5, p, pitch);
  }
  template <int v> static void load_w(const bf16 *p, int64_t pitch) {
    if constexpr (v == 0)
      _tile_loadd(6, p, pitch);
    else
      _tile_loadd(7, p, pitch);
  }
  template <int m, int v> static void dot() {
    if constexpr (m == 0 && v == 0)
      _tile_dpbf16ps(0, 4, 6);
    else if constexpr (m == 0)
      _tile_dpbf16ps(1, 4, 7);
    else if constexpr (v == 0)
      _tile_dpbf16ps(2, 5, 6);
    else
      _tile_dpbf16ps(3, 5, 7);
  }
  template <int m, int v> static void store(float *p, int64_t pitch) {
    if constexpr (m == 0 && v == 0)
      _tile_stored(0, p, pitch);
    else if constexpr (m == 0)
      _tile_stored(1, p, pitch);
    else if constexpr (v == 0)
      _tile_stored(2, p, pitch);
    else
      _tile_stored(3, p, pitch);
  }
};

} // namespace

extern const Tier amx_bf16_tier = {
    "amx_bf16",
    Isa::lanes,
    Isa::rows,
    IMPORT_PIXELS,
    SLOT,
    tile_scratch,
    conv_or_tiles<Tiles>,
    pair<conv_or_tiles<Tiles>>,
    pool,
    eltwise,
    import,
    lrn,
    normalize,
    tile_peak<Tiles>,
};

bool amx_multiplies() { return tiles_multiply<Tiles>(); }

} // namespace inception_fast::cpu
