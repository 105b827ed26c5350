// Convolutions of bfloat16, compiled for AVX-512 with BF16 and for AMX with BF16. All others are AVX-512's with BF16.
#include "simd_avx512_bf16.h"

namespace inception_fast::cpu {
namespace {
using Isa = Avx512Bf16;
}
} // namespace inception_fast::cpu

#include "borrowed.h"
#include "check_amx.h"
#include "conv_amx.h"
#include "pair.h"

namespace inception_fast::cpu {
namespace {

// The eight tile registers.
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

  // The names of registers come from numbers, which GCC's intrinsics do not take from a template.
  template <int t> static void zero() { __asm__ volatile("tilezero\t%%tmm%c0" : : "i"(t)); }
  template <int t> static void load(const bf16 *p, int64_t pitch) {
    __asm__ volatile("tileloadd\t(%0,%1,1), %%tmm%c2" : : "r"(p), "r"(pitch), "i"(t));
  }
  template <int sum, int x, int w> static void dot() {
    __asm__ volatile("tdpbf16ps\t%%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(x), "i"(w));
  }
  template <int t> static void store(float *p, int64_t pitch) {
    __asm__ volatile("tilestored\t%%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(pitch), "i"(t) : "memory");
  }
};

constexpr auto conv_by_lanes = borrowed<avx512_bf16_tier, &Tier::conv, ConvOp>;

} // namespace

extern const Tier amx_bf16_tier = {
    "amx_bf16",
    Isa::lanes,
    Isa::rows,
    IMPORT_PIXELS,
    SLOT,
    tile_scratch,
    conv_or_tiles<Tiles, conv_by_lanes>,
    &avx512_winograd,
    borrowed_scratch<avx512_bf16_tier, &Tier::depthwise_scratch>,
    borrowed<avx512_bf16_tier, &Tier::depthwise>,
    pair<conv_or_tiles<Tiles, conv_by_lanes>>,
    borrowed<avx512_bf16_tier, &Tier::pool>,
    borrowed<avx512_bf16_tier, &Tier::eltwise>,
    borrowed<avx512_bf16_tier, &Tier::import>,
    borrowed<avx512_bf16_tier, &Tier::lrn>,
    borrowed<avx512_bf16_tier, &Tier::normalize>,
    tile_peak<Tiles>,
};

bool amx_multiplies() { return tiles_multiply<Tiles>(); }

} // namespace inception_fast::cpu
