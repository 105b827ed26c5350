// The weight gradient of a convolution as a product: dw[oc, (tap, c)] = grad^T x(tap), summed over the batch's pixels.
//
// Shapes: see weight_gradient_op.h. Numbers: a stretch of at most `depth` pixels is summed from zero in float, in
// order; stretches are added to dw in order. bfloat16 is multiplied in pairs of pixels where the tier has such
// products, else widened. Algorithm: all workers pack the stretch's gradient, tiles of `rows` output channels by
// pixels; then each takes its share of (tap, two vectors of c, tile): it packs the tap's pixels of x once, zeros for
// padding, and multiplies tile after tile with them, `rows` by two vectors of sums in registers.
#pragma once

#include "pool.h"
#include "weight_gradient_op.h"

namespace inception_fast::cpu {
namespace {

constexpr int WIDE = 2 * Isa::lanes;

template <class T> inline constexpr bool in_pairs() { return Isa::dots && sizeof(T) == sizeof(bf16); }

inline int32_t tiles_of(const WeightGradientOp &op) { return (op.oc + Isa::rows - 1) / Isa::rows; }
inline int32_t panels_of(const WeightGradientOp &op) { return (op.c + WIDE - 1) / WIDE; }

inline int64_t length_of(const WeightGradientOp &op, int64_t first) {
  int64_t left = int64_t(op.n) * op.oh * op.ow - first;
  return left < op.depth ? left : op.depth;
}

// One value, or two neighbours in K, as a step of the product takes it.
inline void put(float *to, float value) { *to = value; }
inline void put(float *to, bf16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  __builtin_memcpy(to, &bits, sizeof bits);
}
inline void put(float *to, bf16 first, bf16 second) {
  uint32_t both = uint32_t(second.bits) << 16 | first.bits;
  __builtin_memcpy(to, &both, sizeof both);
}

template <class T> void pack_rows(const WeightGradientOp &op, int64_t first, const Worker &worker) {
  int64_t length = length_of(op, first);
  int32_t tiles = tiles_of(op);
  int32_t low = int32_t(int64_t(tiles) * worker.index / worker.count);
  int32_t high = int32_t(int64_t(tiles) * (worker.index + 1) / worker.count);
  const T *grad = static_cast<const T *>(op.grad) + first * op.grad_pitch;
  for (int32_t tile = low; tile < high; ++tile) {
    float *to = op.rows + int64_t(tile) * op.units * Isa::rows;
    int32_t row = tile * Isa::rows, count = op.oc - row < Isa::rows ? op.oc - row : Isa::rows;
    constexpr int step = in_pairs<T>() ? 2 : 1;
    for (int64_t p = 0; p < length; p += step, to += Isa::rows) {
      const T *from = grad + p * op.grad_pitch + row;
      for (int32_t r = 0; r < count; ++r) {
        if constexpr (step == 2)
          put(to + r, from[r], p + 1 < length ? from[op.grad_pitch + r] : bf16{0});
        else
          put(to + r, from[r]);
      }
      for (int32_t r = count; r < Isa::rows; ++r)
        to[r] = 0.0f;
    }
  }
}

// Where tap (kh, kw) of each pixel of the stretch lies in x.
inline void place(const WeightGradientOp &op, int64_t first, int32_t kh, int32_t kw, int64_t *places) {
  int64_t length = length_of(op, first), map = int64_t(op.oh) * op.ow;
  int64_t image = first / map;
  int32_t oy = static_cast<int32_t>(first % map / op.ow), ox = static_cast<int32_t>(first % map % op.ow);
  for (int64_t p = 0; p < length; ++p) {
    int32_t iy = oy * op.stride_h - op.top + kh, ix = ox * op.stride_w - op.left + kw;
    bool in = uint32_t(iy) < uint32_t(op.h) && uint32_t(ix) < uint32_t(op.w);
    places[p] = in ? ((image * op.h + iy) * op.w + ix) * op.x_pitch : -1;
    if (++ox == op.ow) {
      ox = 0;
      if (++oy == op.oh) {
        oy = 0;
        ++image;
      }
    }
  }
}

template <class T> inline Isa::V fetch(const T *x, int64_t place, int count) {
  return place < 0 || count <= 0 ? Isa::zero() : read_some(x + place, count);
}

// The lanes of two vectors of widened bfloat16 as pairs.
inline Isa::V zipped(Isa::V first, Isa::V second) {
  typedef uint32_t Bits __attribute__((vector_size(sizeof(Isa::V))));
  return (Isa::V)(((Bits)first >> 16) | (Bits)second);
}

// Channels [c, c + 2 vectors) of the stretch's pixels of x.
template <class T>
inline void pack_columns(const WeightGradientOp &op, int64_t length, int32_t c, const int64_t *places, float *to) {
  const T *x = static_cast<const T *>(op.x) + c;
  int count = op.c - c < WIDE ? op.c - c : WIDE;
  if constexpr (in_pairs<T>()) {
    for (int64_t p = 0; p < length; p += 2, to += WIDE) {
      int64_t second = p + 1 < length ? places[p + 1] : -1;
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const T *from = x + v * Isa::lanes;
        int some = count - v * Isa::lanes;
        Isa::store(to + v * Isa::lanes, zipped(fetch(from, places[p], some), fetch(from, second, some)));
      }
    }
  } else {
    for (int64_t p = 0; p < length; ++p, to += WIDE)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v)
        Isa::store(to + v * Isa::lanes, fetch(x + v * Isa::lanes, places[p], count - v * Isa::lanes));
  }
}

template <bool Pairs, class I = Isa>
inline void products(const float *rows, const float *columns, int64_t units, typename I::V (&sum)[I::rows][2]) {
  for (int64_t k = 0; k < units; ++k, rows += I::rows, columns += WIDE) {
    if constexpr (Pairs) {
      typename I::Pairs b[2];
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v)
        b[v] = I::load_pairs(reinterpret_cast<const bf16 *>(columns + v * I::lanes));
#pragma GCC unroll 16
      for (int r = 0; r < I::rows; ++r) {
        typename I::Pairs a = I::set_pair(reinterpret_cast<const bf16 *>(rows + r));
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v)
          sum[r][v] = I::dot(a, b[v], sum[r][v]);
      }
    } else {
      typename I::V b[2];
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v)
        b[v] = I::load(columns + v * I::lanes);
#pragma GCC unroll 16
      for (int r = 0; r < I::rows; ++r) {
        typename I::V a = I::set(rows[r]);
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v)
          sum[r][v] = I::fma(a, b[v], sum[r][v]);
      }
    }
  }
}

template <bool Pairs>
__attribute__((noinline)) void tile_product(const float *rows, const float *columns, int64_t units, int count,
                                            int width, bool start, float *dw, int64_t pitch) {
  Isa::V sum[Isa::rows][2];
#pragma GCC unroll 16
  for (int r = 0; r < Isa::rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v)
      sum[r][v] = Isa::zero();
  products<Pairs>(rows, columns, units, sum);
#pragma GCC unroll 16
  for (int r = 0; r < Isa::rows; ++r) {
    if (r >= count)
      return;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      int some = width - v * Isa::lanes;
      if (some <= 0)
        break;
      float *to = dw + r * pitch + v * Isa::lanes;
      write_some(to, start ? sum[r][v] : read_some(to, some) + sum[r][v], some);
    }
  }
}

template <class T> void multiply_tiles(const WeightGradientOp &op, int64_t first, const Worker &worker) {
  int64_t length = length_of(op, first), units = in_pairs<T>() ? (length + 1) / 2 : length;
  int32_t tiles = tiles_of(op), panels = panels_of(op), taps = op.kh * op.kw;
  int64_t total = int64_t(taps) * panels * tiles, pitch = int64_t(taps) * op.c;
  int64_t low = total * worker.index / worker.count, high = total * (worker.index + 1) / worker.count;
  float *columns = op.columns + worker.index * op.units * WIDE;
  int64_t *places = op.places + worker.index * op.depth;
  int32_t placed = -1;
  for (int64_t at = low; at < high;) {
    int64_t panel = at / tiles;
    int32_t tap = static_cast<int32_t>(panel / panels), c = static_cast<int32_t>(panel % panels) * WIDE;
    if (tap != placed)
      place(op, first, tap / op.kw, tap % op.kw, places);
    placed = tap;
    pack_columns<T>(op, length, c, places, columns);
    for (int64_t end = (panel + 1) * tiles < high ? (panel + 1) * tiles : high; at < end; ++at) {
      int32_t row = static_cast<int32_t>(at % tiles) * Isa::rows;
      int count = op.oc - row < Isa::rows ? op.oc - row : Isa::rows, width = op.c - c < WIDE ? op.c - c : WIDE;
      const float *rows = op.rows + at % tiles * op.units * Isa::rows;
      float *dw = op.dw + row * pitch + int64_t(tap) * op.c + c;
      tile_product<in_pairs<T>()>(rows, columns, units, count, width, first == 0, dw, pitch);
    }
  }
}

void pack_gradient(const WeightGradientOp &op, int64_t first, const Worker &worker) {
  op.type == Type::float32 ? pack_rows<float>(op, first, worker) : pack_rows<bf16>(op, first, worker);
}

void multiply_gradient(const WeightGradientOp &op, int64_t first, const Worker &worker) {
  op.type == Type::float32 ? multiply_tiles<float>(op, first, worker) : multiply_tiles<bf16>(op, first, worker);
}

} // namespace
} // namespace inception_fast::cpu
