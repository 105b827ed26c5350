// What a tile unit does by itself: whether its products are right, and how many there are a second.
#pragma once

#include "conv_amx.h"
#include "peak.h"

namespace inception_fast::cpu {
namespace {

// Whether products and places of a tile are what they should be, on operands that are all different.
template <class Tiles> inline bool tiles_multiply() {
  alignas(64) bf16 x[3 * TILE_ROWS * SLOT], w[SLOT * 2 * Isa::lanes];
  alignas(64) float sums[3 * TILE_ROWS * 2 * Isa::lanes];
  auto half = [](int64_t value) { // of 0 to 127
    float wide = static_cast<float>(value);
    uint32_t bits;
    __builtin_memcpy(&bits, &wide, sizeof bits);
    return bf16{static_cast<uint16_t>(bits >> 16)};
  };
  auto x_at = [](int64_t r, int64_t k) { return (r * 7 + k * 3) % 101; };
  auto w_at = [](int64_t k, int64_t n) { return (k * 5 + n * 11) % 97; };
  for (int64_t k = 0; k < SLOT; ++k) {
    for (int64_t r = 0; r < 3 * TILE_ROWS; ++r)
      x[r * SLOT + k] = half(x_at(r, k));
    for (int64_t n = 0; n < 2 * Isa::lanes; ++n)
      w[(k / 2 * 2 * Isa::lanes + n) * 2 + k % 2] = half(w_at(k, n));
  }
  Row row{0, 0};
  Depth depth{&row, 0, 1, 1, false};
  Feed feeds[3] = {
      {x, SLOT, nullptr}, {x + TILE_ROWS * SLOT, SLOT, nullptr}, {x + 2 * TILE_ROWS * SLOT, SLOT, nullptr}};
  Ahead ahead{nullptr, 0, 0};
  Pending<2, float> before;
  Tiles tiles;
  tiles.configure();
  multiply<3, 2>(tiles, depth, feeds, w, ahead, before);
  before.room = sums;
  before.store_held(tiles);
  tiles.release();
  for (int64_t r = 0; r < 3 * TILE_ROWS; ++r)
    for (int64_t n = 0; n < 2 * Isa::lanes; ++n) {
      int64_t sum = 0;
      for (int64_t k = 0; k < SLOT; ++k)
        sum += x_at(r, k) * w_at(k, n);
      if (sums[r * 2 * Isa::lanes + n] != static_cast<float>(sum))
        return false;
    }
  return true;
}

// `peak` on the tile unit.
template <class Tiles> int64_t tile_peak(Type type, int64_t rounds, float *sink) {
  if (type != Type::bfloat16)
    return peak(type, rounds, sink);
  alignas(64) bf16 operand[TILE_ROWS * SLOT];
  alignas(64) float sums[TILE_ROWS * Isa::lanes];
  for (bf16 &value : operand)
    value = bf16{0x3000};
  Tiles tiles;
  tiles.configure();
  tiles.fence();
  tiles.template load<4>(operand, SLOT * 2);
  tiles.template load<5>(operand, SLOT * 2);
  tiles.template load<6>(operand, SLOT * 2);
  tiles.template load<7>(operand, SLOT * 2);
  zero<0, 4>(tiles);
  for (int64_t i = 0; i < rounds; ++i) {
    tiles.template dot<0, 4, 6>();
    tiles.template dot<1, 4, 7>();
    tiles.template dot<2, 5, 6>();
    tiles.template dot<3, 5, 7>();
  }
  tiles.template store<0>(sums, Isa::lanes * 4);
  tiles.release();
  *sink = sums[0];
  return 4 * TILE_ROWS * SLOT * Isa::lanes;
}

} // namespace
} // namespace inception_fast::cpu
