// The convolution of conv.h for stride 1 by fewer products: Winograd's and Toom and Cook's algorithm.
//
// A tile is MH x MW outputs of every column. Its inputs [nh, nw, c] become v = B' x B by channel, the weights were
// made u = G w G' when they were packed, m[p] = sum over c of v[p, c] * u[p, c] at each of the nh * nw points p, and
// y = A' m A. x and y are as in conv.h, packed w is [panel][p][c][columns]. Whatever x and y are, all between them is
// float32, weights too: rounded to bfloat16, points would err many times as much as y's own rounding.
//
// Numbers: another rounding than conv.h's, with a budget of its own. Channels are summed in order; a tile depends on
// its own inputs alone, so a value does not depend on block, thread or batch. An infinity or NaN of x reaches every
// output of the tiles that read it.
//
// A block of tiles is transformed into the thread's memory, [p][tile][c], and should stay in the level 2 cache while
// all panels pass over it: for each panel and each p a product of matrices, then the way back and conv.h's epilogue.
#pragma once

#include "conv.h"
#include "winograd_axis.h"

namespace inception_fast::cpu {
namespace {

// Of transformed tiles and sums of a block. Nearly all processors with 512-bit vectors have a level 2 cache of 1 MB.
constexpr int64_t TILE_BYTES = (Isa::lanes == 16 ? 480 : 320) << 10;

// m[r] = sum over k of v[r, k] * u[k], for R tiles.
template <int R, int NV>
__attribute__((noinline)) void product(const float *v, int64_t pitch, int64_t depth, const float *u, float *m,
                                       const char *ahead, int lines) {
  const float *x[R];
  Isa::V sum[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    x[r] = v + r * pitch;
#pragma GCC unroll 2
    for (int i = 0; i < NV; ++i)
      sum[r][i] = Isa::zero();
  }
  stretch(x, depth, u, sum, ahead, lines);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < NV; ++i)
      Isa::store(m + (r * NV + i) * Isa::lanes, sum[r][i]);
}

template <int R, int NV>
void some(int rows, const float *v, int64_t pitch, int64_t depth, const float *u, float *m, const char *ahead,
          int lines) {
  if constexpr (R > 1)
    if (rows < R)
      return some<R - 1, NV>(rows, v, pitch, depth, u, m, ahead, lines);
  product<R, NV>(v, pitch, depth, u, m, ahead, lines);
}

template <class H, class W> struct Winograd {
  static constexpr int P = H::n * W::n;

  struct Room {
    int64_t tiles, pitch; // pitch: floats from tile to tile, an odd number of lines
    float *zeros, *v, *m; // [pitch], [P][tiles][pitch], [P][tiles][MAX_VECTORS * lanes]
  };
  // Where a tile is.
  struct Place {
    int64_t image;
    int32_t y, x; // its first output
  };

  static int64_t count(const ConvOp &op) { return int64_t(op.n) * ceil_div(op.oh, H::M) * ceil_div(op.ow, W::M); }

  static size_t lay_out(const ConvOp &op, unsigned char *scratch, Room &room) {
    room.pitch = (ceil_div(op.c, 16) | 1) * 16;
    int64_t sums = MAX_VECTORS * Isa::lanes;
    int64_t fit = TILE_BYTES / (int64_t(sizeof(float)) * P * (room.pitch + sums));
    room.tiles = lesser(greater(1, count(op)), greater(Isa::rows, fit / Isa::rows * Isa::rows));
    size_t at = 0;
    auto take = [&](int64_t floats) {
      float *p = reinterpret_cast<float *>(scratch + at);
      at += aligned(sizeof(float) * floats);
      return p;
    };
    room.zeros = take(room.pitch);
    room.v = take(P * room.tiles * room.pitch);
    room.m = take(P * room.tiles * sums);
    return at;
  }

  static Place place(const ConvOp &op, int64_t tile) {
    int64_t across = ceil_div(op.ow, W::M), down = ceil_div(op.oh, H::M);
    return {tile / (across * down), static_cast<int32_t>(tile / across % down) * H::M,
            static_cast<int32_t>(tile % across) * W::M};
  }

  // v = B' x along one axis, of which x and v are `step` elements apart.
  template <class A, int step> static void into(const Isa::V *x, Isa::V *v) {
    if constexpr (A::n == 1) {
      v[0] = x[0];
    } else {
      constexpr int k = A::pairs;
      Isa::V first = x[2 * k * step], last = x[(2 * k + 1) * step];
#pragma GCC unroll 8
      for (int i = k - 1; i >= 0; --i) {
        first = Isa::fma(Isa::set(A::table.ends[i]), x[2 * i * step], first);
        last = Isa::fma(Isa::set(A::table.ends[i]), x[(2 * i + 1) * step], last);
      }
#pragma GCC unroll 8
      for (int pair = 0; pair < k; ++pair) {
        Isa::V even = x[2 * k * step], odd = Isa::set(A::table.odd[pair][k - 1]) * x[(2 * k - 1) * step];
#pragma GCC unroll 8
        for (int i = k - 2; i >= 0; --i) {
          even = Isa::fma(Isa::set(A::table.even[pair][i]), x[(2 * i + 2) * step], even);
          odd = Isa::fma(Isa::set(A::table.odd[pair][i]), x[(2 * i + 1) * step], odd);
        }
        v[(2 * pair + 1) * step] = even + odd;
        v[(2 * pair + 2) * step] = even - odd;
      }
      v[0] = first;
      v[(A::n - 1) * step] = last;
    }
  }

  // y = A' m along one axis.
  template <class A, int from, int to> static void back(const Isa::V *m, Isa::V *y) {
    if constexpr (A::n == 1) {
      y[0] = m[0];
    } else {
      Isa::V sum[A::pairs], difference[A::pairs];
#pragma GCC unroll 8
      for (int pair = 0; pair < A::pairs; ++pair) {
        sum[pair] = m[(2 * pair + 1) * from] + m[(2 * pair + 2) * from];
        difference[pair] = m[(2 * pair + 1) * from] - m[(2 * pair + 2) * from];
      }
#pragma GCC unroll 8
      for (int i = 0; i < A::M; ++i) {
        const Isa::V *part = i % 2 ? difference : sum;
        Isa::V value = i == 0 ? m[0] + part[0] : Isa::set(A::table.power[0][i]) * part[0];
#pragma GCC unroll 8
        for (int pair = 1; pair < A::pairs; ++pair)
          value = i == 0 ? value + part[pair] : Isa::fma(Isa::set(A::table.power[pair][i]), part[pair], value);
        y[i * to] = i == A::M - 1 ? value + m[(A::n - 1) * from] : value;
      }
    }
  }

  // v = B' x B of a vector of channels, points `apart`. Compiled once for all types of x, as `outputs` for those of y.
  __attribute__((noinline)) static void inputs(const Isa::V (&x)[P], float *to, int64_t apart) {
    Isa::V part[P], v[P];
#pragma GCC unroll 8
    for (int j = 0; j < W::n; ++j)
      into<H, W::n>(x + j, part + j);
#pragma GCC unroll 8
    for (int i = 0; i < H::n; ++i)
      into<W, 1>(part + i * W::n, v + i * W::n);
#pragma GCC unroll 64
    for (int p = 0; p < P; ++p)
      Isa::store(to + p * apart, v[p]);
  }

  // Tile `at` of the block: its channels, a vector at a time.
  template <class X>
  static void transform(const ConvOp &op, const X *x, const Room &room, const Place &place, int64_t at) {
    const X *zeros = reinterpret_cast<const X *>(room.zeros), *from[P];
    int32_t top = place.y - op.top, left = place.x - op.left;
    for (int i = 0; i < H::n; ++i)
      for (int j = 0; j < W::n; ++j) {
        bool in = uint32_t(top + i) < uint32_t(op.h) && uint32_t(left + j) < uint32_t(op.w);
        int64_t pixel = ((place.image + op.x_image) * op.h + top + i) * op.w + left + j;
        from[i * W::n + j] = in ? x + pixel * op.x.pitch : zeros;
      }
    for (int32_t c = 0; c < op.c; c += Isa::lanes) {
      Isa::V part[P];
      int some = op.c - c;
      for (int p = 0; p < P; ++p)
        part[p] = some < Isa::lanes ? Isa::load_some(from[p] + c, some) : Isa::load(from[p] + c);
      inputs(part, room.v + at * room.pitch + c, room.tiles * room.pitch);
    }
  }

  // The sums of tiles [low, high) of the block, shared out evenly over the fewest register blocks. Each of these asks
  // for its share of the next point's weights, which are read this once and so come from memory.
  template <int NV>
  static void multiply(const ConvOp &op, const float *u, const Room &room, int64_t low, int64_t high) {
    constexpr int columns = NV * Isa::lanes;
    int64_t blocks = ceil_div(high - low, Isa::rows), slab = int64_t(op.c) * columns;
    int lines = static_cast<int>(ceil_div(2 * columns * int64_t(sizeof(float)), 64 * blocks));
    for (int p = 0; p < P; ++p, u += slab)
      for (int64_t i = 0; i < blocks; ++i) {
        int64_t begin = low + (high - low) * i / blocks, end = low + (high - low) * (i + 1) / blocks;
        const float *ahead = u + slab + slab * i / blocks;
        some<Isa::rows, NV>(static_cast<int>(end - begin), room.v + (p * room.tiles + begin) * room.pitch, room.pitch,
                            op.c, u, room.m + (p * room.tiles + begin) * columns, reinterpret_cast<const char *>(ahead),
                            lines);
      }
  }

  // y = A' m A of a vector of columns, sums of the points `apart`. Compiled once for all widths and types of y.
  __attribute__((noinline)) static void outputs(const float *sums, int64_t apart, Isa::V (&y)[H::M * W::M]) {
    Isa::V m[P], half[H::M * W::n];
#pragma GCC unroll 64
    for (int p = 0; p < P; ++p)
      m[p] = Isa::load(sums + p * apart);
#pragma GCC unroll 8
    for (int j = 0; j < W::n; ++j)
      back<H, W::n, W::n>(m + j, half + j);
#pragma GCC unroll 8
    for (int j = 0; j < H::M; ++j)
      back<W, 1, 1>(half + j * W::n, y + j * W::M);
  }

  template <int NV, class Y>
  static void finish_tile(const ConvOp &op, const Sink<Y> &sink, const Room &room, const Place &place, int64_t at) {
    constexpr int columns = NV * Isa::lanes, M = H::M * W::M;
    Isa::V y[M][NV];
#pragma GCC unroll 2
    for (int i = 0; i < NV; ++i) {
      Isa::V whole[M];
      outputs(room.m + at * columns + i * Isa::lanes, room.tiles * columns, whole);
#pragma GCC unroll 36
      for (int j = 0; j < M; ++j)
        y[j][i] = whole[j];
    }
    Columns<NV> scale(sink.scale), shift(sink.shift);
    int64_t first = (place.image + op.y_image) * op.y_map + op.y_start;
    int rows = static_cast<int>(lesser(H::M, op.oh - place.y)),
        across = static_cast<int>(lesser(W::M, op.ow - place.x));
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < across; ++j)
        finish<NV, Y>(sink, first + (place.y + i) * op.y_row + place.x + j, y[i * W::M + j], scale, shift);
  }

  template <int NV, class Y>
  static void run_panel(const ConvOp &op, const Call &call, const Panel &panel, const Room &room, int64_t tile0,
                        int64_t low, int64_t high) {
    const float *u = op.packed + panel.packed;
    multiply<NV>(op, u, room, low - tile0, high - tile0);
    Sink<Y> sink = sink_of<Y>(op, call, panel, u + int64_t(P) * op.c * NV * Isa::lanes);
    for (int64_t tile = low; tile < high; ++tile)
      finish_tile<NV, Y>(op, sink, room, place(op, tile), tile - tile0);
  }

  template <class Y>
  static void run_panel(const ConvOp &op, const Call &call, const Panel &panel, const Room &room, int64_t tile0,
                        int64_t low, int64_t high) {
    if (panel.vectors == 2)
      run_panel<2, Y>(op, call, panel, room, tile0, low, high);
    else
      run_panel<1, Y>(op, call, panel, room, tile0, low, high);
  }

  template <class X> static void run_of(const ConvOp &op, const Call &call, const Worker &worker) {
    int64_t tiles = count(op);
    Part part = part_of(op, worker, tiles, winograd_groups(op, tiles, worker.count));
    if (part.low >= part.high)
      return;
    Room room;
    lay_out(op, worker.scratch, room);
    for (int64_t i = 0; i < room.pitch; ++i)
      room.zeros[i] = 0;
    const X *x = static_cast<const X *>(base_of(call, op.x)) + op.x.offset;
    int64_t held = part.tile1 - part.tile0, blocks = ceil_div(held, room.tiles);
    for (int64_t i = 0; i < blocks; ++i) {
      int64_t tile0 = part.tile0 + held * i / blocks, tile1 = part.tile0 + held * (i + 1) / blocks;
      bool ready = false;
      for (int p = 0; p < op.panel_count; ++p) {
        const Panel &panel = op.panels[p];
        int64_t low = greater(tile0, part.begin(panel)), high = lesser(tile1, part.end(panel));
        if (low >= high)
          continue;
        for (int64_t tile = tile0; tile < tile1 && !ready; ++tile)
          transform(op, x, room, place(op, tile), tile - tile0);
        ready = true;
        if (panel.y.type == Type::bfloat16)
          run_panel<bf16>(op, call, panel, room, tile0, low, high);
        else
          run_panel<float>(op, call, panel, room, tile0, low, high);
      }
    }
  }

  static void run(const ConvOp &op, const Call &call, const Worker &worker) {
    if (op.x.type == Type::bfloat16)
      run_of<bf16>(op, call, worker);
    else
      run_of<float>(op, call, worker);
  }

  static size_t scratch(const ConvOp &op) {
    Room room;
    return lay_out(op, nullptr, room);
  }
};

inline size_t winograd_scratch(const ConvOp &op) {
  return with_axes(op, [&](auto h, auto w) { return Winograd<decltype(h), decltype(w)>::scratch(op); });
}

inline void winograd(const ConvOp &op, const Call &call, const Worker &worker) {
  with_axes(op, [&](auto h, auto w) { Winograd<decltype(h), decltype(w)>::run(op, call, worker); });
}

} // namespace
} // namespace inception_fast::cpu
