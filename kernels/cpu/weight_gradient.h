// The weight gradient of a convolution as a product: dw[oc, (tap, c)] = grad^T x(tap), summed over the batch's pixels.
//
// Shapes: see weight_gradient_op.h. Numbers: a stretch of at most `depth` pixels is summed from zero in float, in
// order; stretches are added to dw in order. bfloat16 is multiplied in pairs of pixels where the tier has such
// products, else widened. Algorithm: all workers pack the stretch's gradient, tiles of `rows` output channels by
// pixels; then each takes its share of (tap, two vectors of c, tile): it packs the tap's pixels of x once, those on
// the map, lists the steps that they belong to, and multiplies tile after tile at these, `rows` by two vectors of sums
// in registers. The last vector of c stands alone where their number is odd, and `rows` is what leaves the last tile
// the fewest rows too many.
#pragma once

#include "some.h"
#include "weight_gradient_op.h"

namespace inception_fast::cpu {
namespace {

constexpr int WIDE = 2 * Isa::lanes;
constexpr int LINE = 64; // bytes that are fetched together
constexpr int HEIGHTS = 4, LEAST_ROWS = Isa::rows > HEIGHTS ? Isa::rows - HEIGHTS + 1 : 1; // of a tile

template <class T> inline constexpr bool in_pairs() { return Isa::dots && sizeof(T) == sizeof(bf16); }

inline int32_t tiles_of(const WeightGradientOp &op) { return (op.oc + op.rows - 1) / op.rows; }
inline int64_t lesser_of(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t length_of(const WeightGradientOp &op, int64_t first) { return lesser_of(op.end - first, op.depth); }

// The lanes of two vectors of widened bfloat16 as pairs.
inline Isa::V zipped(Isa::V first, Isa::V second) {
  typedef uint32_t Bits __attribute__((vector_size(sizeof(Isa::V))));
  return (Isa::V)(((Bits)first >> 16) | (Bits)second);
}

// Output channels [row, row + Rows) of pixels of the gradient, zeros from oc on.
template <int Rows, class T>
inline void pack_tile(const WeightGradientOp &op, int64_t first, int64_t length, int32_t row, float *to) {
  constexpr int step = in_pairs<T>() ? 2 : 1;
  const T *from = static_cast<const T *>(op.grad) + first * op.grad_pitch + row;
  int left = op.oc - row < Rows ? op.oc - row : Rows;
  for (int64_t p = 0; p < length; p += step, from += step * op.grad_pitch, to += Rows)
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r += Isa::lanes) {
      Isa::V value = left > r ? Isa::load_some(from + r, left - r) : Isa::zero();
      if constexpr (step == 2)
        value = zipped(value, p + 1 < length ? Isa::load_some(from + op.grad_pitch + r, left - r) : Isa::zero());
      if (Rows - r < Isa::lanes)
        Isa::store_some(to + r, value, Rows - r);
      else
        Isa::store(to + r, value);
    }
}

template <int Rows, class T> inline void pack_rows(const WeightGradientOp &op, int64_t first, const Worker &worker) {
  int64_t length = length_of(op, first), tiles = tiles_of(op);
  int64_t low = tiles * worker.index / worker.count, high = tiles * (worker.index + 1) / worker.count;
  for (int64_t tile = low; tile < high; ++tile)
    pack_tile<Rows, T>(op, first, length, static_cast<int32_t>(tile) * Rows, op.packed + tile * op.units * Rows);
}

// Where tap (kh, kw) of each pixel of the stretch lies in x.
template <class T>
inline void place(const WeightGradientOp &op, int64_t first, int32_t kh, int32_t kw, const void **places) {
  int64_t length = length_of(op, first), map = int64_t(op.oh) * op.ow, step = op.stride_w * op.x_pitch;
  int64_t image = first / map, oy = first % map / op.ow, ox = first % map % op.ow;
  // Columns [low, high) of the result meet the map.
  int64_t start = kw - op.left, low = start < 0 ? (-start + op.stride_w - 1) / op.stride_w : 0;
  int64_t high = op.w > start ? lesser_of((op.w - start + op.stride_w - 1) / op.stride_w, op.ow) : 0;
  const void *zeros = op.zeros;
  for (int64_t p = 0; p < length; ox = 0) {
    int64_t end = lesser_of(op.ow, ox + length - p), iy = oy * op.stride_h - op.top + kh;
    bool in = uint64_t(iy) < uint64_t(op.h);
    const T *x = static_cast<const T *>(op.x) + ((image * op.h + iy) * op.w + start) * op.x_pitch;
    int64_t from = in ? lesser_of(low, end) : end, to = in ? lesser_of(high, end) : end;
    for (; ox < from; ++ox)
      places[p++] = zeros;
    for (; ox < to; ++ox)
      places[p++] = x + ox * step;
    for (; ox < end; ++ox)
      places[p++] = zeros;
    if (++oy == op.oh) {
      oy = 0;
      ++image;
    }
  }
  places[length] = zeros; // the second of the last pair
}

// Keeps the steps with a pixel on the map: how many, and where each begins in a packed tile.
template <class T>
inline int64_t choose_steps(const WeightGradientOp &op, int64_t first, const void **places, int32_t *steps) {
  constexpr int pixels = in_pairs<T>() ? 2 : 1;
  int64_t length = length_of(op, first), count = 0;
  for (int64_t p = 0; p < length; p += pixels) {
    if (places[p] == op.zeros && places[p + pixels - 1] == op.zeros)
      continue;
    for (int i = 0; i < pixels; ++i)
      places[count * pixels + i] = places[p + i];
    steps[count++] = static_cast<int32_t>(p / pixels) * op.rows;
  }
  return count;
}

// Channels [c, c + NV vectors) of `length` pixels of x.
template <int NV, class T, class I = Isa>
inline void pack_columns(const WeightGradientOp &op, int64_t length, int32_t c, const void *const *places, float *to) {
  int count = op.c - c;
  auto at = [&](int64_t p) { return static_cast<const T *>(places[p]) + c; };
  if constexpr (in_pairs<T>()) {
    for (int64_t p = 0; p < length; p += 2, to += NV * I::lanes)
      I::template store_pairs<NV>(to, at(p), at(p + 1), count);
  } else if (count >= NV * I::lanes) {
    for (int64_t p = 0; p < length; ++p, to += NV * I::lanes)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        I::store(to + v * I::lanes, I::load(at(p) + v * I::lanes));
  } else {
    for (int64_t p = 0; p < length; ++p, to += NV * I::lanes)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        I::store(to + v * I::lanes, read_some(at(p) + v * I::lanes, count - v * I::lanes));
  }
}

// What a tile is summed over: `count` steps, and where each begins in the tile.
struct Steps {
  const int32_t *at;
  int64_t count;
};

template <bool Pairs, int Rows, int NV, class I = Isa>
inline void products(const float *tile, const float *columns, const Steps &steps, typename I::V (&sum)[Rows][NV]) {
  for (int64_t k = 0; k < steps.count; ++k, columns += NV * I::lanes) {
    const float *rows = tile + steps.at[k];
    if constexpr (Pairs) {
      typename I::Pairs b[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        b[v] = I::load_pairs(reinterpret_cast<const bf16 *>(columns + v * I::lanes));
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        typename I::Pairs a = I::set_pair(reinterpret_cast<const bf16 *>(rows + r));
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v)
          sum[r][v] = I::dot(a, b[v], sum[r][v]);
      }
    } else {
      typename I::V b[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        b[v] = I::load(columns + v * I::lanes);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        typename I::V a = I::set(rows[r]);
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v)
          sum[r][v] = I::fma(a, b[v], sum[r][v]);
      }
    }
  }
}

// What of a tile is written: `count` rows of `width` channels, added to what is there unless this is the `start`.
struct Place {
  float *dw;
  int64_t pitch;
  int count, width;
  bool start;
};

template <bool Pairs, int Rows, int NV>
__attribute__((noinline)) void tile_product(const float *rows, const float *columns, const Steps &steps,
                                            const Place &to) {
  Isa::V sum[Rows][NV];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      if (r < to.count)
        __builtin_prefetch(to.dw + r * to.pitch + v * Isa::lanes, 1);
      sum[r][v] = Isa::zero();
    }
  }
  products<Pairs>(rows, columns, steps, sum);
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    if (r >= to.count)
      return;
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      int some = to.width - v * Isa::lanes;
      float *dw = to.dw + r * to.pitch + v * Isa::lanes;
      write_some(dw, to.start ? sum[r][v] : read_some(dw, some) + sum[r][v], some);
    }
  }
}

// Asks for a tile's share of the channels behind [c, c + NV vectors), which the next panel packs.
template <int NV, class T>
inline void ask_next(const WeightGradientOp &op, int64_t pixels, int32_t c, int64_t share, int64_t shares,
                     const void *const *places) {
  int32_t next = c + NV * Isa::lanes, end = lesser_of(op.c, next + WIDE);
  for (int64_t p = pixels * share / shares; p < pixels * (share + 1) / shares; ++p)
    for (int32_t at = next; at < end; at += LINE / sizeof(T))
      __builtin_prefetch(static_cast<const T *>(places[p]) + at, 0, 2);
}

// Tiles [low, high) of channels [c, c + NV vectors) of a tap.
template <int Rows, int NV, class T>
inline void multiply_panel(const WeightGradientOp &op, int64_t first, int32_t tap, int32_t c, int64_t low, int64_t high,
                           const Steps &steps, const void *const *places, float *columns) {
  int64_t pitch = int64_t(op.kh) * op.kw * op.c;
  int64_t pixels = steps.count * (in_pairs<T>() ? 2 : 1);
  pack_columns<NV, T>(op, pixels, c, places, columns);
  for (int64_t tile = low; tile < high; ++tile) {
    ask_next<NV, T>(op, pixels, c, tile - low, high - low, places);
    int64_t row = tile * Rows;
    Place to{op.dw + row * pitch + int64_t(tap) * op.c + c, pitch, static_cast<int>(lesser_of(op.oc - row, Rows)),
             static_cast<int>(lesser_of(op.c - c, NV * Isa::lanes)), first == op.begin};
    tile_product<in_pairs<T>(), Rows, NV>(op.packed + tile * op.units * Rows, columns, steps, to);
  }
}

// Calls `f(outer, first vector of a panel, its vectors, from tile, to tile)` for a worker's share of
// [outers][panels of two vectors][tiles]. The share is a range of vectors: those of a tile and a panel are one after
// the other and stay together.
template <class F> inline void share_panels(int64_t outers, int64_t vectors, int64_t tiles, const Worker &worker, F f) {
  int64_t total = outers * vectors * tiles;
  int64_t low = total * worker.index / worker.count, high = total * (worker.index + 1) / worker.count;
  for (int64_t outer = low / (vectors * tiles); outer < outers && outer * vectors * tiles < high; ++outer)
    for (int64_t vector = 0; vector < vectors; vector += 2) {
      int64_t at = (outer * vectors + vector) * tiles, together = lesser_of(vectors - vector, 2);
      auto tile_from = [&](int64_t place) {
        int64_t tile = (place - at + together - 1) / together;
        return place <= at ? 0 : lesser_of(tile, tiles);
      };
      int64_t from = tile_from(low), to = tile_from(high);
      if (from < to)
        f(outer, vector, together, from, to);
    }
}

template <int Rows, class T>
inline void multiply_tiles(const WeightGradientOp &op, int64_t first, const Worker &worker) {
  float *columns = op.columns + worker.index * op.units * WIDE;
  const void **places = op.places + worker.index * (op.depth + 1);
  int32_t *list = op.steps + worker.index * op.units;
  Steps steps{list, 0};
  int64_t placed = -1, vectors = (op.c + Isa::lanes - 1) / Isa::lanes;
  auto panel = [&](int64_t tap, int64_t vector, int64_t together, int64_t from, int64_t to) {
    if (tap != placed) {
      place<T>(op, first, static_cast<int32_t>(tap / op.kw), static_cast<int32_t>(tap % op.kw), places);
      steps.count = choose_steps<T>(op, first, places, list);
    }
    placed = tap;
    auto multiply = together == 2 ? multiply_panel<Rows, 2, T> : multiply_panel<Rows, 1, T>;
    multiply(op, first, static_cast<int32_t>(tap), static_cast<int32_t>(vector) * Isa::lanes, from, to, steps, places,
             columns);
  };
  share_panels(int64_t(op.kh) * op.kw, vectors, tiles_of(op), worker, panel);
}

// Calls `f` with the operation's rows and element type as constants.
template <int Rows, class F> inline void with_rows(const WeightGradientOp &op, F f) {
  if constexpr (Rows > LEAST_ROWS)
    if (op.rows < Rows)
      return with_rows<Rows - 1>(op, f);
  op.type == Type::float32 ? f.template operator()<Rows, float>() : f.template operator()<Rows, bf16>();
}

struct PackRows {
  const WeightGradientOp &op;
  int64_t first;
  const Worker &worker;
  template <int Rows, class T> void operator()() const { pack_rows<Rows, T>(op, first, worker); }
};

struct MultiplyTiles {
  const WeightGradientOp &op;
  int64_t first;
  const Worker &worker;
  template <int Rows, class T> void operator()() const { multiply_tiles<Rows, T>(op, first, worker); }
};

void pack_gradient(const WeightGradientOp &op, int64_t first, const Worker &worker) {
  with_rows<Isa::rows>(op, PackRows{op, first, worker});
}

void multiply_gradient(const WeightGradientOp &op, int64_t first, const Worker &worker) {
  with_rows<Isa::rows>(op, MultiplyTiles{op, first, worker});
}

} // namespace
} // namespace inception_fast::cpu
