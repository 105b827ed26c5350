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

// The operands of 16 pixels: `pitch` elements from one to the next, and those of a last slot, SLOT from one to the
// next.
struct Feed {
  const bf16 *at;
  int64_t pitch;
  const bf16 *end;
};

// What to add to a feed, and to its last slots, for a row of taps.
struct Row {
  int64_t offset, end;
};

// K: the rows of taps [first, last) of `slots` times 32 channels each, and of one last slot more where there are
// `ends`.
struct Depth {
  const Row *of;
  int64_t first, last, slots;
  bool ends;

  int64_t width() const { return slots + ends; }
  int64_t steps() const { return (last - first) * width(); }
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

template <int first, int count, class Tiles> inline void zero(Tiles &tiles) {
  if constexpr (first < count) {
    tiles.template zero<first>();
    zero<first + 1, count>(tiles);
  }
}

template <int first, int count, int NV, class Tiles> inline void store_sums(Tiles &tiles, float *sums) {
  if constexpr (first < count) {
    constexpr int64_t row = NV * Isa::lanes;
    tiles.template store<first>(sums + first / NV * TILE_ROWS * row + first % NV * Isa::lanes, row * 4);
    store_sums<first + 1, count, NV>(tiles, sums);
  }
}

// Rows of `sums` that wait for scale, shift, residual, ReLU, rounding and store. Those of `held` tiles are in registers
// and go to `room` first.
template <int NV, class Y> struct Pending {
  Sink<Y> sink;
  float *room;
  const float *sums;
  const int64_t *pixels;
  const int32_t *places; // rows of sums
  int64_t count = 0;
  int held = 0;

  template <class Tiles> void store_held(Tiles &tiles) {
    tiles.fence();
    if (held == 1)
      store_sums<0, NV, NV>(tiles, room);
    else if (held == 2)
      store_sums<0, 2 * NV, NV>(tiles, room);
    else if constexpr (NV == 2)
      if (held == 3)
        store_sums<0, 3 * NV, NV>(tiles, room);
    tiles.fence();
    held = 0;
  }
  template <class Tiles> void finish_all(Tiles &tiles);
};

// What finishes the rows of a `Pending`. Stores to y may change anything as the compiler sees it, so a local copy of
// this holds what all rows share.
template <int NV, class Y> struct Finisher {
  Columns<NV> scale, shift;
  Isa::V least, factor;
  const Pending<NV, Y> *of;
  const float *sums;
  Y *y;
  const bf16 *residual; // of whole panels
  int64_t y_pitch, residual_pitch;
  bool whole;

  explicit Finisher(const Pending<NV, Y> &pending) : of(&pending), whole(false) {
    if (!pending.count)
      return;
    const Sink<Y> &sink = pending.sink;
    scale = Columns<NV>(sink.scale);
    shift = Columns<NV>(sink.shift);
    least = Isa::set(sink.relu ? 0.0f : -__builtin_inff());
    factor = Isa::set(sink.residual_scale);
    sums = pending.sums;
    y = sink.y;
    y_pitch = sink.y_pitch;
    residual = static_cast<const bf16 *>(sink.residual);
    residual_pitch = sink.residual_pitch;
    whole = sink.width == NV * Isa::lanes && (!sink.residual || sink.residual_half);
  }

  // Asks for what a later row adds: pixels lie too far apart for the processor to do it unasked.
  void ask(int64_t pixel) const {
    if (whole && residual)
      __builtin_prefetch(residual + pixel * residual_pitch, 0, 3);
  }
  void row(int64_t pixel, int64_t place) const {
    const float *sum = sums + place * (NV * Isa::lanes);
    if (!whole) {
      Columns<NV> row(sum);
      return finish<NV, Y>(of->sink, pixel, row.v, scale, shift);
    }
    Isa::V value[NV];
    for (int v = 0; v < NV; ++v) {
      value[v] = Isa::fma(Isa::load(sum + v * Isa::lanes), scale.v[v], shift.v[v]);
      if (residual)
        value[v] = Isa::fma(factor, value[v], Isa::load(residual + pixel * residual_pitch + v * Isa::lanes));
      value[v] = Isa::at_least(least, value[v]);
    }
    Y *to = y + pixel * y_pitch;
    if constexpr (NV == 2 && sizeof(Y) == sizeof(bf16)) {
      Isa::store_both(to, value[0], value[1]);
    } else {
      for (int v = 0; v < NV; ++v)
        Isa::store(to + v * Isa::lanes, value[v]);
    }
  }
};

template <int NV, class Y> template <class Tiles> inline void Pending<NV, Y>::finish_all(Tiles &tiles) {
  store_held(tiles);
  const Finisher<NV, Y> finisher(*this);
  for (int64_t i = 0; i < count; ++i)
    finisher.row(pixels[i], places[i]);
  count = 0;
}

// Of each kind one; at most one has rows.
class Waiting {
public:
  // The kind's own, after all others are finished.
  template <int NV, class Y, class Tiles> Pending<NV, Y> &of(Tiles &tiles) {
    if (open_ != &kind<NV, Y>())
      finish_all(tiles);
    open_ = &kind<NV, Y>();
    return kind<NV, Y>();
  }
  template <class Tiles> void finish_all(Tiles &tiles) {
    half1_.finish_all(tiles);
    half2_.finish_all(tiles);
    whole1_.finish_all(tiles);
    whole2_.finish_all(tiles);
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

// The unit in the first step of a block: each sum begins from zero, and the one of the block before that is in its
// register is stored first, between products, so that none waits for all of them.
template <int NV, class Tiles> struct First {
  Tiles &tiles;
  float *room; // of the block before, null without one

  template <int t> void load(const bf16 *p, int64_t pitch) { tiles.template load<t>(p, pitch); }
  template <int sum, int x, int w> void dot() {
    if (room)
      store_sums<sum, sum + 1, NV>(tiles, room);
    tiles.template zero<sum>();
    tiles.template dot<sum, x, w>();
  }
};

// [M * 16, NV * 16] sums = x w, left in the unit's registers. Finishes the rows of `before`, whose own sums may be
// there still. The unit's accesses are hidden from the compiler, hence the fences.
template <int M, int NV, class Y, class Tiles>
inline void multiply(Tiles &tiles, const Depth &depth, const Feed (&x)[M], const bf16 *w, Ahead &ahead,
                     Pending<NV, Y> &before) {
  if (before.held != M || depth.steps() == 0)
    before.store_held(tiles);
  tiles.fence();
  int64_t pitch[M], slot_pitch[M];
  for (int m = 0; m < M; ++m) {
    pitch[m] = x[m].pitch * int64_t(sizeof(bf16));
    slot_pitch[m] = SLOT * int64_t(sizeof(bf16));
  }
  const Finisher<NV, Y> finisher(before);
  const int64_t *pixels = before.pixels;
  const int32_t *places = before.places;
  int64_t done = 0, count = before.count, many = ceil_div(count, greater(1, depth.steps()));
  Ahead asked = ahead;
  First<NV, Tiles> first{tiles, before.held ? before.room : nullptr};
  bool begun = false;
  const bf16 *at[M];
  auto product = [&](const int64_t (&pitch)[M]) {
    if (begun)
      step<M, NV>(tiles, at, pitch, w);
    else
      step<M, NV>(first, at, pitch, w);
    begun = true;
    w += SLOT * NV * Isa::lanes;
    asked.step();
    for (int64_t end = lesser(count, done + many); done < end; ++done) {
      finisher.ask(pixels[done + TILE_ROWS]);
      finisher.row(pixels[done], places[done]);
    }
  };
  w += depth.first * depth.width() * SLOT * NV * Isa::lanes;
  for (int64_t row = depth.first; row < depth.last; ++row) {
    for (int m = 0; m < M; ++m)
      at[m] = x[m].at + depth.of[row].offset;
    for (int64_t slot = 0; slot < depth.slots; ++slot) {
      product(pitch);
      for (int m = 0; m < M; ++m)
        at[m] += SLOT;
    }
    if (depth.ends) {
      for (int m = 0; m < M; ++m)
        at[m] = x[m].end + depth.of[row].end;
      product(slot_pitch);
    }
  }
  if (!begun) { // padding alone
    zero<0, M * NV>(tiles);
    for (; done < count; ++done)
      finisher.row(pixels[done], places[done]);
  }
  ahead = asked;
  before.count = 0;
  before.held = M;
}

} // namespace
} // namespace inception_fast::cpu
