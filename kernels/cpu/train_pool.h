// Pools in training: a maximum that remembers where it was in a byte, an average, and the gradients of both.
//
//   maximum   y = the largest of its window, NaN above all, the first of equals; dx = the sum of the gradients of the
//             windows whose largest value it was
//   average   y = the sum of its window / count;                       dx = the sum of g / count of the windows over it
//
// Shapes: see train_pool_op.h. Numbers: sums are float, in the order of the window's places forward and of the windows
// backward, rounded once.
// Algorithm: for each pixel of the result the few pixels that it depends on are listed once, then all channels go over
// the list; the backward gathers, so that no pixel is written twice and none has to be cleared.
#pragma once

#include "some.h"
#include "train_pool_op.h"

namespace inception_fast::cpu {
namespace {

using Ints = int32_t __attribute__((vector_size(4 * Isa::lanes)));
using Bytes = unsigned char __attribute__((vector_size(Isa::lanes)));

inline Ints read_taps(const unsigned char *p, int count) {
  Bytes bytes{};
  if (count < Isa::lanes)
    __builtin_memcpy(&bytes, p, static_cast<size_t>(count));
  else
    __builtin_memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Ints);
}

inline void write_taps(unsigned char *p, Ints taps, int count) {
  Bytes bytes = __builtin_convertvector(taps, Bytes);
  if (count < Isa::lanes)
    __builtin_memcpy(p, &bytes, static_cast<size_t>(count));
  else
    __builtin_memcpy(p, &bytes, sizeof bytes);
}

// A pixel that a result depends on: where it is, its place in the window, and in an average's gradient 1 / count.
struct Source {
  int64_t pixel;
  int32_t tap;
  float share;
};

struct Span {
  int32_t first, end; // of the map, what lies outside left out
  int32_t counted;    // with padding or without
};

inline Span window(int32_t place, int32_t stride, int32_t before, int32_t kernel, int32_t size, bool include_pad) {
  int32_t from = place * stride - before, to = from + kernel, most = size + before;
  int32_t first = from < 0 ? 0 : from, end = to < size ? to : size;
  return {first, end, include_pad ? (to < most ? to : most) - from : end - first};
}

struct Sources {
  int count;
  Source at[MOST_TAPS];
  float divisor;
};

inline void list_forward(const TrainPoolOp &op, int32_t image, int32_t oy, int32_t ox, Sources &found) {
  Span rows = window(oy, op.stride_h, op.top, op.kh, op.h, op.count_include_pad);
  Span columns = window(ox, op.stride_w, op.left, op.kw, op.w, op.count_include_pad);
  found.count = 0;
  found.divisor = static_cast<float>(rows.counted) * static_cast<float>(columns.counted);
  for (int32_t y = rows.first; y < rows.end; ++y)
    for (int32_t x = columns.first; x < columns.end; ++x) {
      int32_t tap = (y - oy * op.stride_h + op.top) * op.kw + x - ox * op.stride_w + op.left;
      found.at[found.count++] = {(int64_t(image) * op.h + y) * op.w + x, tap, 0.0f};
    }
}

// The windows over pixel (y, x) are those that start at most kernel - 1 before it.
inline void list_backward(const TrainPoolOp &op, int32_t image, int32_t y, int32_t x, Sources &found) {
  auto first = [](int32_t at, int32_t kernel, int32_t stride) { return at < kernel ? 0 : (at - kernel) / stride + 1; };
  int32_t row = y + op.top, column = x + op.left;
  found.count = 0;
  for (int32_t oy = first(row, op.kh, op.stride_h); oy < op.oh && oy * op.stride_h <= row; ++oy)
    for (int32_t ox = first(column, op.kw, op.stride_w); ox < op.ow && ox * op.stride_w <= column; ++ox) {
      int32_t tap = (row - oy * op.stride_h) * op.kw + column - ox * op.stride_w;
      float share = 0.0f;
      if (!op.maximum) {
        Span rows = window(oy, op.stride_h, op.top, op.kh, op.h, op.count_include_pad);
        Span columns = window(ox, op.stride_w, op.left, op.kw, op.w, op.count_include_pad);
        share = 1.0f / (static_cast<float>(rows.counted) * static_cast<float>(columns.counted));
      }
      found.at[found.count++] = {(int64_t(image) * op.oh + oy) * op.ow + ox, tap, share};
    }
}

// Each treats NV vectors of channels from channel c on, the last of them `last` channels: a source is looked up once
// for all of them, and their sums do not wait for each other.
template <int NV, class T>
inline void largest(const TrainPoolOp &op, const Sources &from, T *y, unsigned char *taps, int32_t c, int last) {
  Isa::V best[NV];
  Ints place[NV];
  for (int v = 0; v < NV; ++v)
    best[v] = Isa::set(-__builtin_inff()), place[v] = Ints{} + from.at[0].tap;
  for (int i = 0; i < from.count; ++i) {
    const T *x = static_cast<const T *>(op.x) + from.at[i].pixel * op.pitch + c;
    const Ints tap = Ints{} + from.at[i].tap;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      Isa::V value = read_some(x + v * Isa::lanes, v + 1 < NV ? Isa::lanes : last);
      Ints larger = (value > best[v]) | (value != value);
      best[v] = larger ? value : best[v];
      place[v] = larger ? tap : place[v];
    }
  }
  for (int v = 0; v < NV; ++v) {
    int count = v + 1 < NV ? Isa::lanes : last;
    write_some(y + c + v * Isa::lanes, best[v], count);
    write_taps(taps + c + v * Isa::lanes, place[v], count);
  }
}

template <int NV, class T> inline void mean(const TrainPoolOp &op, const Sources &from, T *y, int32_t c, int last) {
  Isa::V sum[NV];
  for (int v = 0; v < NV; ++v)
    sum[v] = Isa::zero();
  for (int i = 0; i < from.count; ++i) {
    const T *x = static_cast<const T *>(op.x) + from.at[i].pixel * op.pitch + c;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      sum[v] = sum[v] + read_some(x + v * Isa::lanes, v + 1 < NV ? Isa::lanes : last);
  }
  for (int v = 0; v < NV; ++v)
    write_some(y + c + v * Isa::lanes, sum[v] / Isa::set(from.divisor), v + 1 < NV ? Isa::lanes : last);
}

template <bool Maximum, int NV, class T>
inline void gather(const TrainPoolOp &op, const Sources &from, T *dx, int32_t c, int last) {
  Isa::V sum[NV];
  for (int v = 0; v < NV; ++v)
    sum[v] = Isa::zero();
  for (int i = 0; i < from.count; ++i) {
    const Source source = from.at[i];
    const T *grad = static_cast<const T *>(op.x) + source.pixel * op.pitch + c;
    const unsigned char *taps = op.taps + source.pixel * op.c + c;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      int count = v + 1 < NV ? Isa::lanes : last;
      Isa::V g = read_some(grad + v * Isa::lanes, count);
      if constexpr (Maximum)
        sum[v] = sum[v] + (read_taps(taps + v * Isa::lanes, count) == source.tap ? g : Isa::zero());
      else
        sum[v] = Isa::fma(g, Isa::set(source.share), sum[v]);
    }
  }
  for (int v = 0; v < NV; ++v)
    write_some(dx + c + v * Isa::lanes, sum[v], v + 1 < NV ? Isa::lanes : last);
}

// Calls visit(image, row, column, pixel) for this worker's share of the pixels of an h x w result.
template <class Visit> inline void each_pixel(int32_t n, int32_t h, int32_t w, const Worker &worker, Visit visit) {
  int64_t pixels = int64_t(n) * h * w;
  int64_t pixel = pixels * worker.index / worker.count, end = pixels * (worker.index + 1) / worker.count;
  for (; pixel < end; ++pixel) {
    int32_t place = static_cast<int32_t>(pixel % (int64_t(h) * w));
    visit(static_cast<int32_t>(pixel / (int64_t(h) * w)), place / w, place % w, pixel);
  }
}

template <int N> struct Vectors {
  static constexpr int count = N;
};

// All channels of one pixel: visit(vectors, c, last) for each four vectors, then for each that is left.
template <class Visit> inline void each_channel(int32_t channels, Visit visit) {
  constexpr int32_t four = 4 * Isa::lanes;
  int32_t c = 0;
  for (; c + four <= channels; c += four)
    visit(Vectors<4>{}, c, Isa::lanes);
  for (; c < channels; c += Isa::lanes)
    visit(Vectors<1>{}, c, channels - c);
}

template <bool Maximum, class T> void pool_forward(const TrainPoolOp &op, const Worker &worker) {
  Sources from;
  each_pixel(op.n, op.oh, op.ow, worker, [&](int32_t image, int32_t oy, int32_t ox, int64_t pixel) {
    list_forward(op, image, oy, ox, from);
    T *y = static_cast<T *>(op.y) + pixel * op.c;
    each_channel(op.c, [&](auto vectors, int32_t c, int last) {
      if constexpr (Maximum)
        largest<vectors.count>(op, from, y, op.taps + pixel * op.c, c, last);
      else
        mean<vectors.count>(op, from, y, c, last);
    });
  });
}

template <bool Maximum, class T> void pool_backward(const TrainPoolOp &op, const Worker &worker) {
  Sources from;
  each_pixel(op.n, op.h, op.w, worker, [&](int32_t image, int32_t y, int32_t x, int64_t pixel) {
    list_backward(op, image, y, x, from);
    T *dx = static_cast<T *>(op.y) + pixel * op.c;
    each_channel(op.c,
                 [&](auto vectors, int32_t c, int last) { gather<Maximum, vectors.count>(op, from, dx, c, last); });
  });
}

void train_pool_forward(const TrainPoolOp &op, const Worker &worker) {
  if (op.type == Type::float32)
    op.maximum ? pool_forward<true, float>(op, worker) : pool_forward<false, float>(op, worker);
  else
    op.maximum ? pool_forward<true, bf16>(op, worker) : pool_forward<false, bf16>(op, worker);
}

void train_pool_gradient(const TrainPoolOp &op, const Worker &worker) {
  if (op.type == Type::float32)
    op.maximum ? pool_backward<true, float>(op, worker) : pool_backward<false, float>(op, worker);
  else
    op.maximum ? pool_backward<true, bf16>(op, worker) : pool_backward<false, bf16>(op, worker);
}

} // namespace
} // namespace inception_fast::cpu
