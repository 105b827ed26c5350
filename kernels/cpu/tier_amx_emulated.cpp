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
#include "pair.h"
#include "pointwise.h"
#include "pool.h"

namespace inception_fast::cpu {
namespace {

// As AMX defines it, but for numbers too small to be normal, which it takes for zero.
class Tiles {
public:
  void configure() { configured_ = true; }
  void release() { configured_ = false; }
  static void fence() {}

  template <int m, int v> void zero() {
    expect_configured();
    __builtin_memset(sums_[m][v], 0, sizeof sums_[m][v]);
  }
  template <int m> void load_x(const bf16 *p, int64_t pitch) { load(x_[m], p, pitch); }
  template <int v> void load_w(const bf16 *p, int64_t pitch) { load(w_[v], p, pitch); }
  template <int m, int v> void dot() {
    expect_configured();
    for (int row = 0; row < 16; ++row) {
      Isa::V first{}, second{};
      for (int k = 0; k < 16; ++k) {
        first += Isa::set(x_[m][row][2 * k]) * Isa::load_first(w_[v][k]);
        second += Isa::set(x_[m][row][2 * k + 1]) * Isa::load_second(w_[v][k]);
      }
      Isa::store(sums_[m][v][row], Isa::load(sums_[m][v][row]) + (first + second));
    }
  }
  template <int m, int v> void store(float *p, int64_t pitch) {
    expect_configured();
    for (int row = 0; row < 16; ++row)
      __builtin_memcpy(reinterpret_cast<char *>(p) + row * pitch, sums_[m][v][row], 64);
  }

private:
  using Rows = bf16[16][32];

  void load(Rows &rows, const bf16 *p, int64_t pitch) {
    expect_configured();
    for (int row = 0; row < 16; ++row)
      __builtin_memcpy(rows[row], reinterpret_cast<const char *>(p) + row * pitch, 64);
  }
  void expect_configured() const {
    if (!configured_)
      __builtin_trap();
  }

  bool configured_ = false;
  float sums_[2][2][16][16];
  Rows x_[2], w_[2];
};

} // namespace

extern const Tier amx_emulated_tier = {
    "amx_bf16_emulated",        Isa::lanes, Isa::rows, IMPORT_PIXELS, SLOT, tile_scratch, conv_or_tiles<Tiles>,
    pair<conv_or_tiles<Tiles>>, pool,       eltwise,   import,        lrn,  normalize,    tile_peak<Tiles>,
};

} // namespace inception_fast::cpu
