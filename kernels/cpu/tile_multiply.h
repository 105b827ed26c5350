// Products on a tile unit: 16 M pixels by NV vectors of columns over all of K, and what became of the sums before.
//
// A unit has eight tile registers, `zero<t>`, `load<t>`, `dot<sum, x, w>`, `store<t>`: up to six are sums. While it
// multiplies, the vector units scale, round and store the sums of the block before, a few rows a step: `Pending`.
#pragma once

#include "conv.h"

namespace inception_fast::cpu {
namespace {

constexpr int64_t TILE_ROWS = 16;
constexpr int64_t SLOT = 32; // channels: a row of a tile
static_assert(Isa::lanes == TILE_ROWS, "a vector is a row of sums");

// The operands of 16 pixels: `pitch` elements from one to the next, `plane` from 32 channels to the next.
struct Feed {
  const bf16 *at;
  int64_t pitch, plane;
};

// K: rows of taps, each with an offset to add to a feed, of `planes` times 32 channels.
struct Depth {
  const int64_t *offsets;
  int64_t rows, planes;

  int64_t steps() const { return rows * planes; }
};

// Lines of later weights that every step asks for, as long as there are any left.
struct Ahead {
  const char *at;
  int64_t lines, left;

  void step() {
    if (left > 0) {
      for (int64_t i = 0; i < lines; ++i)
        ask(at);
      left -= lines;
    }
  }
};

// Rows of `sums` that wait for scale, shift, residual, ReLU, rounding and store: `done` of `count` had them.
template <int NV, class Y> struct Pending {
  Sink<Y> sink;
  const float *sums;
  const int64_t *pixels;
  int64_t count = 0, done = 0;

  void rows(int64_t many, const Columns<NV> &scale, const Columns<NV> &shift) {
    for (int64_t end = lesser(count, done + many); done < end; ++done) {
      Isa::V sum[NV];
      for (int v = 0; v < NV; ++v)
        sum[v] = Isa::load(sums + (done * NV + v) * Isa::lanes);
      finish<NV, Y>(sink, pixels[done], sum, scale, shift);
    }
  }
  void finish_all() {
    if (done < count)
      rows(count, Columns<NV>(sink.scale), Columns<NV>(sink.shift));
    count = done = 0;
  }
};

// Of each kind one; at most one has rows.
class Waiting {
public:
  // The kind's own, after all others are finished.
  template <int NV, class Y> Pending<NV, Y> &of() {
    if (open_ != &kind<NV, Y>())
      finish_all();
    open_ = &kind<NV, Y>();
    return kind<NV, Y>();
  }
  void finish_all() {
    half1_.finish_all();
    half2_.finish_all();
    whole1_.finish_all();
    whole2_.finish_all();
  }

private:
  template <int NV, class Y> Pending<NV, Y> &kind() {
    if constexpr (sizeof(Y) == sizeof(bf16)) {
      if constexpr (NV == 1)
        return half1_;
      else
        return half2_;
    } else {
      if constexpr (NV == 1)
        return whole1_;
      else
        return whole2_;
    }
  }

  const void *open_ = nullptr;
  Pending<1, bf16> half1_;
  Pending<2, bf16> half2_;
  Pending<1, float> whole1_;
  Pending<2, float> whole2_;
};

// Sums and operands of one step share eight registers: with six sums one is left for x and one for w.
template <int M, int NV, class Tiles>
inline void step(Tiles &tiles, const bf16 *const (&x)[M], const int64_t (&x_pitch)[M], const bf16 *w) {
  constexpr int64_t w_pitch = NV * 2 * Isa::lanes * int64_t(sizeof(bf16));
  const bf16 *w1 = w + (NV - 1) * 2 * Isa::lanes;
  if constexpr (M == 3 && NV == 2) {
    tiles.template load<6>(x[0], x_pitch[0]);
    tiles.template load<7>(w, w_pitch);
    tiles.template dot<0, 6, 7>();
    tiles.template load<7>(w1, w_pitch);
    tiles.template dot<1, 6, 7>();
    tiles.template load<6>(x[1], x_pitch[1]);
    tiles.template dot<3, 6, 7>();
    tiles.template load<7>(w, w_pitch);
    tiles.template dot<2, 6, 7>();
    tiles.template load<6>(x[2], x_pitch[2]);
    tiles.template dot<4, 6, 7>();
    tiles.template load<7>(w1, w_pitch);
    tiles.template dot<5, 6, 7>();
  } else {
    static_assert(M <= 2, "sums in 0 to 3, x in 4 and 5, w in 6 and 7");
    tiles.template load<4>(x[0], x_pitch[0]);
    tiles.template load<6>(w, w_pitch);
    tiles.template dot<0, 4, 6>();
    if constexpr (NV == 2) {
      tiles.template load<7>(w1, w_pitch);
      tiles.template dot<1, 4, 7>();
    }
    if constexpr (M == 2) {
      tiles.template load<5>(x[1], x_pitch[1]);
      tiles.template dot<NV, 5, 6>();
    }
    if constexpr (M == 2 && NV == 2)
      tiles.template dot<3, 5, 7>();
  }
}

template <int first, int count, class Tiles> inline void zero(Tiles &tiles) {
  if constexpr (first < count) {
    tiles.template zero<first>();
    zero<first + 1, count>(tiles);
  }
}

template <int first, int count, int NV, class Tiles> inline void store(Tiles &tiles, float *sums) {
  if constexpr (first < count) {
    constexpr int64_t row = NV * Isa::lanes;
    tiles.template store<first>(sums + first / NV * TILE_ROWS * row + first % NV * Isa::lanes, row * 4);
    store<first + 1, count, NV>(tiles, sums);
  }
}

// sums[M * 16, NV * 16] = x w. Finishes the rows of `before`, whose sums may lie in the same place. The unit's accesses
// are hidden from the compiler, hence the fences.
template <int M, int NV, class Y, class Tiles>
inline void multiply(Tiles &tiles, const Depth &depth, const Feed (&x)[M], const bf16 *w, Ahead &ahead,
                     Pending<NV, Y> &before, float *sums) {
  tiles.fence();
  zero<0, M * NV>(tiles);
  int64_t pitch[M], many = 0;
  for (int m = 0; m < M; ++m)
    pitch[m] = x[m].pitch * int64_t(sizeof(bf16));
  Columns<NV> scale, shift;
  if (before.count) {
    many = ceil_div(before.count, depth.steps());
    scale = Columns<NV>(before.sink.scale);
    shift = Columns<NV>(before.sink.shift);
  }
  for (int64_t row = 0; row < depth.rows; ++row) {
    const bf16 *at[M];
    for (int m = 0; m < M; ++m)
      at[m] = x[m].at + depth.offsets[row];
    for (int64_t plane = 0; plane < depth.planes; ++plane) {
      step<M, NV>(tiles, at, pitch, w);
      for (int m = 0; m < M; ++m)
        at[m] += x[m].plane;
      w += SLOT * NV * Isa::lanes;
      ahead.step();
      before.rows(many, scale, shift);
    }
  }
  before.count = before.done = 0;
  tiles.fence();
  store<0, M * NV, NV>(tiles, sums);
  tiles.fence();
}

} // namespace
} // namespace inception_fast::cpu
