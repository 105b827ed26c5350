// Every kernel, compiled for the baseline of the target, with a tile unit made of loops: the same code and the same
// sums as with AMX, to be tested where there is none.
#include "simd_generic.h"

namespace inception_fast::cpu {
namespace {
using Isa = Generic<16>;
}
} // namespace inception_fast::cpu

#include "check_amx.h"
#include "conv_amx.h"
#include "depthwise.h"
#include "pair.h"
#include "pointwise.h"
#include "pool.h"
#include "train_pairs.h"

namespace inception_fast::cpu {
namespace {

// As AMX defines it, but for numbers too small to be normal, which it takes for zero.
class Tiles {
public:
  void configure() { configured_ = true; }
  void release() { configured_ = false; }
  static void fence() {}

  template <int t> void zero() {
    expect_configured();
    __builtin_memset(tiles_[t], 0, sizeof tiles_[t]);
  }
  template <int t> void load(const bf16 *p, int64_t pitch) {
    expect_configured();
    for (int row = 0; row < 16; ++row)
      __builtin_memcpy(tiles_[t][row], reinterpret_cast<const char *>(p) + row * pitch, 64);
  }
  template <int sum, int x, int w> void dot() {
    expect_configured();
    bf16 rows[16][32], columns[16][32];
    __builtin_memcpy(rows, tiles_[x], sizeof rows);
    __builtin_memcpy(columns, tiles_[w], sizeof columns);
    for (int row = 0; row < 16; ++row) {
      Isa::V first{}, second{}, total;
      for (int k = 0; k < 16; ++k) {
        first += Isa::set(rows[row][2 * k]) * Isa::load_first(columns[k]);
        second += Isa::set(rows[row][2 * k + 1]) * Isa::load_second(columns[k]);
      }
      __builtin_memcpy(&total, tiles_[sum][row], sizeof total);
      total = total + (first + second);
      __builtin_memcpy(tiles_[sum][row], &total, sizeof total);
    }
  }
  template <int t> void store(float *p, int64_t pitch) {
    expect_configured();
    for (int row = 0; row < 16; ++row)
      __builtin_memcpy(reinterpret_cast<char *>(p) + row * pitch, tiles_[t][row], 64);
  }

private:
  void expect_configured() const {
    if (!configured_)
      __builtin_trap();
  }

  bool configured_ = false;
  alignas(64) unsigned char tiles_[8][16][64];
};

} // namespace

extern const TrainPairsTier amx_emulated_train_pairs = {pack_pairs};

extern const Tier amx_emulated_tier = {
    "amx_bf16_emulated",
    Isa::lanes,
    Isa::rows,
    IMPORT_PIXELS,
    SLOT,
    tile_scratch,
    conv_or_tiles<Tiles, conv>,
    &amx_emulated_winograd,
    depthwise_scratch,
    depthwise,
    pair<conv_or_tiles<Tiles, conv>>,
    pool,
    eltwise,
    import,
    lrn,
    normalize,
    tile_peak<Tiles>,
};

} // namespace inception_fast::cpu
