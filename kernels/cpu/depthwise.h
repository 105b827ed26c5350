// y = act(residual + residual_scale * (scale * conv(x, w) + shift)) where every output channel reads one channel of x:
// y of column o sums w[o, tap] * x[o / multiplier, tap] over the taps.
//
// x is NHWC [n, h, w, c], packed w is [panel][kh * kw][columns] in float32, that of bfloat16 rounded before; sums are
// float32, y is rounded once. Numbers: taps in order, a `Chunk` of them from zero, chunks added in order; taps on
// padding are multiplied. A value depends on nothing but its own operands.
//
// A thread takes rows of y of one panel after the other, in strips of rows and columns. The part of x behind a strip is
// first laid out in the thread's memory: one channel for every column of the panel, widened to float32, zeros where
// padding is. So the sums, tiles of pixels in a row by a panel's vectors in registers, know neither borders nor types.
#pragma once

#include "as_float.h"
#include "operands.h"

namespace inception_fast::cpu {
namespace {

constexpr int64_t STRIP_PIXELS = (128 << 10) / (sizeof(float) * MAX_VECTORS * Isa::lanes); // of x: 128 KB
constexpr int64_t STRIP_COLUMNS = 32;
constexpr int WIDEST = Isa::rows >= 14 ? 8 : 4; // pixels of a tile

// The results of a strip, and the pixels of x behind them.
struct Strip {
  int64_t rows, columns, height, width;
};

inline Strip strip_of(const ConvOp &op) {
  Strip s;
  s.columns = ceil_div(op.ow, ceil_div(op.ow, STRIP_COLUMNS));
  int64_t widest = STRIP_PIXELS / op.kh - op.kw; // beside the first kernel
  s.columns = greater(1, lesser(s.columns, widest / op.stride_w + 1));
  s.width = (s.columns - 1) * op.stride_w + op.kw;
  s.rows = greater(1, lesser(op.oh, (STRIP_PIXELS / s.width - op.kh) / op.stride_h + 1));
  s.height = (s.rows - 1) * op.stride_h + op.kh;
  return s;
}

inline size_t depthwise_scratch(const ConvOp &op) {
  Strip s = strip_of(op);
  int64_t behind = Isa::lanes; // the last pixel: its last channel's vector may end there
  return aligned((s.height * s.width * MAX_VECTORS * Isa::lanes + behind) * sizeof(float));
}

// A panel's part of x: where it lies, and how a pixel's channels become columns.
template <class T> struct PanelSource {
  const T *x; // its first channel at pixel (0, 0) of the first image
  int64_t image, pitch;
  int width;  // columns of the panel
  bool plain; // column after column is channel after channel
  // Else vectors of one channel each, in order of their first columns: they may cover columns of the next.
  int count = 0;
  int32_t channel[MAX_VECTORS * Isa::lanes], column[MAX_VECTORS * Isa::lanes];

  PanelSource(const ConvOp &op, const Call &call, const Panel &panel)
      : image(int64_t(op.h) * op.w * op.x.pitch), pitch(op.x.pitch), width(panel.width) {
    int64_t multiplier = op.oc / op.c, first = panel.column / multiplier, at = 0;
    x = static_cast<const T *>(base_of(call, op.x)) + op.x.offset + first;
    plain = multiplier == 1;
    for (int64_t c = first; !plain && at < width; ++c)
      for (int64_t end = lesser(width, (c + 1) * multiplier - panel.column); at < end;
           at = lesser(end, at + Isa::lanes)) {
        channel[count] = static_cast<int32_t>(c - first);
        column[count++] = static_cast<int32_t>(at);
      }
  }
};

// One pixel of x for the panel's columns. Columns behind its width get any channel, or stay as they are.
template <int NV, class T> inline void lay_pixel(const PanelSource<T> &from, const T *x, float *to) {
  if (from.plain) {
    for (int v = 0; v < NV; ++v)
      Isa::store(to + v * Isa::lanes, read(x, v, from.width));
    return;
  }
  for (int i = 0; i < from.count; ++i)
    Isa::store(to + from.column[i], Isa::set(as_float(x[from.channel[i]])));
}

// The part of x from pixel (top, left) on, which may lie outside of the map.
template <int NV, class T>
inline void lay_strip(const ConvOp &op, const PanelSource<T> &from, int64_t image, const Strip &s, int64_t top,
                      int64_t left, float *to) {
  constexpr int64_t columns = NV * Isa::lanes;
  int64_t low = within(-left, 0, s.width), high = within(op.w - left, low, s.width);
  for (int64_t row = top; row < top + s.height; ++row, to += s.width * columns) {
    bool in = row >= 0 && row < op.h;
    int64_t begin = in ? low : s.width, end = in ? high : s.width;
    const T *x = from.x + image * from.image + (row * op.w + left + begin) * from.pitch;
    for (int64_t i = 0; i < begin * columns; i += Isa::lanes)
      Isa::store(to + i, Isa::zero());
    for (int64_t i = begin; i < end; ++i, x += from.pitch)
      lay_pixel<NV>(from, x, to + i * columns);
    for (int64_t i = end * columns; i < s.width * columns; i += Isa::lanes)
      Isa::store(to + i, Isa::zero());
  }
}

// What the tiles of a panel share.
template <class Y> struct Tiling : Sink<Y> {
  const float *weights;
  int64_t width;
};

// sum += w[tap] * x[tap] over a chunk of the taps; x is that of the first pixel.
template <int P, int NV>
inline void sum_taps(const ConvOp &op, const Chunk &chunk, const float *x, const float *w, int64_t width,
                     Isa::V (&sum)[P][NV]) {
  constexpr int64_t columns = NV * Isa::lanes;
  int64_t step = op.stride_w * columns;
  int32_t row = chunk.tap0 / op.kw, column = chunk.tap0 % op.kw;
  w += chunk.tap0 * columns;
  for (int32_t tap = chunk.tap0; tap < chunk.tap1; ++row, column = 0) {
    const float *at = x + (row * width + column) * columns;
    int32_t end = static_cast<int32_t>(lesser(chunk.tap1, tap + op.kw - column));
    for (; tap < end; ++tap, w += columns, at += columns) {
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        Isa::V b = Isa::load(w + v * Isa::lanes);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p)
          sum[p][v] = Isa::fma(Isa::load(at + p * step + v * Isa::lanes), b, sum[p][v]);
      }
    }
  }
}

// P neighbours in a row of y, the first of which is `pixel`.
template <int P, int NV, class Y>
inline void tile_of(const ConvOp &op, const Tiling<Y> &tiling, const float *x, int64_t pixel) {
  alignas(64) float sums[P * NV * Isa::lanes];
  for (int i = 0; i < op.chunk_count; ++i) {
    Isa::V sum[P][NV];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        sum[p][v] = Isa::zero();
    sum_taps<P, NV>(op, op.chunks[i], x, tiling.weights, tiling.width, sum);
    bool whole = op.chunk_count == 1 && !tiling.residual;
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      if (whole) {
        finish<NV, Y, false>(tiling, pixel + p, sum[p], Columns<NV>(tiling.scale), Columns<NV>(tiling.shift));
        continue;
      }
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        float *at = sums + (p * NV + v) * Isa::lanes;
        Isa::store(at, i ? Isa::load(at) + sum[p][v] : sum[p][v]);
      }
    }
    if (whole)
      return;
  }
  int64_t pixels[P];
  for (int p = 0; p < P; ++p)
    pixels[p] = pixel + p;
  finish_rows<NV, Y>(tiling, pixels, sums, P);
}

// `count` neighbours, by tiles of P pixels and of fewer for the rest.
template <int P, int NV, class Y>
inline void row_of(const ConvOp &op, const Tiling<Y> &tiling, const float *x, int64_t pixel, int64_t count) {
  for (; count >= P; count -= P, pixel += P, x += P * op.stride_w * NV * Isa::lanes)
    tile_of<P, NV>(op, tiling, x, pixel);
  if constexpr (P > 1)
    if (count)
      row_of<P / 2, NV>(op, tiling, x, pixel, count);
}

// Rows [begin, end) of y, counted through all images, of one panel.
template <int NV, class T, class Y>
__attribute__((noinline)) void depthwise_panel(const ConvOp &op, const Call &call, const Panel &panel, int64_t begin,
                                               int64_t end, float *scratch) {
  constexpr int64_t columns = NV * Isa::lanes;
  const Strip most = strip_of(op);
  Tiling<Y> tiling;
  tiling.weights = op.packed + panel.packed;
  static_cast<Sink<Y> &>(tiling) = sink_of<Y>(op, call, panel, tiling.weights + int64_t(op.kh) * op.kw * columns);
  const PanelSource<T> source(op, call, panel);
  for (int64_t i = 0; !source.plain && i < most.height * most.width * columns; i += Isa::lanes)
    Isa::store(scratch + i, Isa::zero());
  while (begin < end) {
    int64_t image = begin / op.oh, top = begin % op.oh;
    Strip s = most;
    s.rows = lesser(s.rows, lesser(end - begin, op.oh - top));
    s.height = (s.rows - 1) * op.stride_h + op.kh;
    for (int64_t left = 0; left < op.ow; left += most.columns) {
      s.columns = lesser(most.columns, op.ow - left);
      s.width = tiling.width = (s.columns - 1) * op.stride_w + op.kw;
      lay_strip<NV>(op, source, image, s, top * op.stride_h - op.top, left * op.stride_w - op.left, scratch);
      for (int64_t row = 0; row < s.rows; ++row)
        row_of<WIDEST, NV>(op, tiling, scratch + row * op.stride_h * s.width * columns, (begin + row) * op.ow + left,
                           s.columns);
    }
    begin += s.rows;
  }
}

template <class T> inline void depthwise_of(const ConvOp &op, const Call &call, const Worker &worker) {
  int64_t rows = int64_t(op.n) * op.oh, units = rows * op.panel_count;
  int64_t low = units * worker.index / worker.count, high = units * (worker.index + 1) / worker.count;
  float *scratch = reinterpret_cast<float *>(worker.scratch);
  while (low < high) {
    const Panel &panel = op.panels[low / rows];
    int64_t begin = low % rows, end = lesser(rows, begin + high - low);
    bool half = panel.y.type == Type::bfloat16;
    if (panel.vectors == 2)
      half ? depthwise_panel<2, T, bf16>(op, call, panel, begin, end, scratch)
           : depthwise_panel<2, T, float>(op, call, panel, begin, end, scratch);
    else
      half ? depthwise_panel<1, T, bf16>(op, call, panel, begin, end, scratch)
           : depthwise_panel<1, T, float>(op, call, panel, begin, end, scratch);
    low += end - begin;
  }
}

inline void depthwise(const ConvOp &op, const Call &call, const Worker &worker) {
  if (op.x.type == Type::bfloat16)
    depthwise_of<bf16>(op, call, worker);
  else
    depthwise_of<float>(op, call, worker);
}

} // namespace
} // namespace inception_fast::cpu
