// What a tile unit does by itself: whether its products are right, and how many there are a second.
#pragma once

#include "conv_amx.h"
#include "peak.h"

namespace inception_fast::cpu {
namespace {

// Whether products and places of a tile are what they should be, on operands that are all different.
template <class Tiles> inline bool tiles_multiply() {
  alignas(64) bf16 x[2 * TILE_ROWS * SLOT], w[SLOT * 2 * Isa::lanes];
  alignas(64) float sums[2 * TILE_ROWS * 2 * Isa::lanes];
  auto half = [](int64_t value) { // of 0 to 127
    float wide = static_cast<float>(value);
    uint32_t bits;
    __builtin_memcpy(&bits, &wide, sizeof bits);
    return bf16{static_cast<uint16_t>(bits >> 16)};
  };
  auto x_at = [](int64_t r, int64_t k) { return (r * 7 + k * 3) % 101; };
  auto w_at = [](int64_t k, int64_t n) { return (k * 5 + n * 11) % 97; };
  for (int64_t k = 0; k < SLOT; ++k) {
    for (int64_t r = 0; r < 2 * TILE_ROWS; ++r)
      x[r * SLOT + k] = half(x_at(r, k));
    for (int64_t n = 0; n < 2 * Isa::lanes; ++n)
      w[(k / 2 * 2 * Isa::lanes + n) * 2 + k % 2] = half(w_at(k, n));
  }
  ConvOp op{};
  op.n = op.h = op.w = op.oh = op.ow = op.kh = op.kw = op.stride_h = op.stride_w = op.groups = op.row_taps = 1;
  op.c = SLOT;
  op.row_depth = SLOT;
  Stage stage(op);
  int64_t rows[1] = {0};
  stage.rows = rows;
  Feed feeds[2] = {{x, SLOT, 0}, {x + TILE_ROWS * SLOT, SLOT, 0}};
  Ahead ahead{nullptr, 0, 0};
  Tiles tiles;
  tiles.configure();
  multiply<2, 2>(tiles, stage, feeds, w, ahead, sums);
  tiles.release();
  for (int64_t r = 0; r < 2 * TILE_ROWS; ++r)
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
  tiles.template load_x<0>(operand, SLOT * 2);
  tiles.template load_x<1>(operand, SLOT * 2);
  tiles.template load_w<0>(operand, SLOT * 2);
  tiles.template load_w<1>(operand, SLOT * 2);
  tiles.template zero<0, 0>();
  tiles.template zero<0, 1>();
  tiles.template zero<1, 0>();
  tiles.template zero<1, 1>();
  for (int64_t i = 0; i < rounds; ++i) {
    tiles.template dot<0, 0>();
    tiles.template dot<0, 1>();
    tiles.template dot<1, 0>();
    tiles.template dot<1, 1>();
  }
  tiles.template store<0, 0>(sums, Isa::lanes * 4);
  tiles.release();
  *sink = sums[0];
  return 4 * TILE_ROWS * SLOT * Isa::lanes;
}

} // namespace
} // namespace inception_fast::cpu
