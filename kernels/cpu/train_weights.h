// The weights u = G w G' of winograd.h's kernels from weights of any strides, as fast as they change in training.
//
// A few channels of a panel are gathered as [tap][channel][columns], then transformed by columns. Numbers: the
// coefficients of G and the sums are float, where winograd_pack.cpp rounds once; of 2x2 tiles for 3x3 they are exact.
#pragma once

#include "train_conv.h"
#include "winograd_axis.h"

namespace inception_fast::cpu {
namespace {

constexpr int32_t GATHERED = 16; // channels: a line of those weights whose channels are neighbours
constexpr int MOST_COLUMNS = 2 * Isa::lanes;

// to[tap][channel - low][columns], room for GATHERED channels and MOST_COLUMNS a tap.
inline void gather(const TrainConvOp &op, const Panel &panel, int32_t low, int32_t high, float *to) {
  int columns = panel.vectors * Isa::lanes;
  for (int tap = 0; tap < op.kh * op.kw; ++tap, to += GATHERED * MOST_COLUMNS) {
    const float *from = op.weight + panel.column * op.column + tap / op.kw * op.row + tap % op.kw * op.tap;
    if (op.column == 1) {
      for (int32_t c = low; c < high; ++c)
        for (int v = 0; v < panel.vectors; ++v)
          Isa::store(to + (c - low) * columns + v * Isa::lanes,
                     Isa::load_some(from + c * op.channel + v * Isa::lanes, panel.width - v * Isa::lanes));
      continue;
    }
    for (int i = 0; i < columns; ++i)
      for (int32_t c = low; c < high; ++c)
        to[(c - low) * columns + i] = i < panel.width ? from[i * op.column + c * op.channel] : 0.0f;
  }
}

// u = G w along one axis, of which w and u are `step` elements apart.
template <class A, int step> inline void transform_weights(const Isa::V *w, Isa::V *u) {
  if constexpr (A::n == 1) {
    u[0] = w[0];
  } else {
    u[0] = Isa::set(A::table.zero) * w[0];
#pragma GCC unroll 8
    for (int pair = 0; pair < A::pairs; ++pair) {
      Isa::V even = Isa::set(A::table.weight[pair][0]) * w[0], odd = Isa::set(A::table.weight[pair][1]) * w[step];
#pragma GCC unroll 8
      for (int tap = 2; tap < A::R; ++tap) {
        Isa::V &part = tap % 2 ? odd : even;
        part = Isa::fma(Isa::set(A::table.weight[pair][tap]), w[tap * step], part);
      }
      u[(2 * pair + 1) * step] = even + odd;
      u[(2 * pair + 2) * step] = even - odd;
    }
    u[(A::n - 1) * step] = w[(A::R - 1) * step];
  }
}

template <class H, class W>
void pack_tiles(const TrainConvOp &op, const Panel &panel, int32_t low, int32_t high, float *to) {
  constexpr int taps = H::R * W::R;
  alignas(64) float w[taps * GATHERED * MOST_COLUMNS];
  int columns = panel.vectors * Isa::lanes;
  int64_t apart = int64_t(op.c) * columns;
  for (int32_t c0 = low; c0 < high; c0 += GATHERED) {
    int32_t c1 = c0 + GATHERED < high ? c0 + GATHERED : high;
    gather(op, panel, c0, c1, w);
    for (int at = 0; at < (c1 - c0) * columns; at += Isa::lanes) {
      Isa::V in[taps], half[H::n * W::R], u[H::n * W::n];
#pragma GCC unroll 25
      for (int tap = 0; tap < taps; ++tap)
        in[tap] = Isa::load(w + tap * GATHERED * MOST_COLUMNS + at);
#pragma GCC unroll 8
      for (int j = 0; j < W::R; ++j)
        transform_weights<H, W::R>(in + j, half + j);
#pragma GCC unroll 8
      for (int i = 0; i < H::n; ++i)
        transform_weights<W, 1>(half + i * W::R, u + i * W::n);
#pragma GCC unroll 64
      for (int p = 0; p < H::n * W::n; ++p)
        Isa::store(to + p * apart + int64_t(c0) * columns + at, u[p]);
    }
  }
}

inline void pack_weights(const TrainConvOp &op, const Panel &panel, int32_t low, int32_t high, float *to) {
  with_axes(op, [&](auto h, auto w) { pack_tiles<decltype(h), decltype(w)>(op, panel, low, high, to); });
}

} // namespace
} // namespace inception_fast::cpu
