// y = act(pool(x) + shift): maximum (NaN wins, padding is minus infinity) or average over windows of [n, h, w, c].
//
// Numbers: an average adds each window row from zero, then the rows, then divides once; the order is the same in every
// case. Work is split over pixels times groups of channels, so that a global average is shared out by channels.
#pragma once

#include "some.h"

namespace inception_fast::cpu {
namespace {

template <class X> struct Window {
  const X *x; // pixel (y0, x0)
  int32_t rows, columns;
  int64_t row_pitch, pitch;
  float divisor;
};

template <class X> inline Window<X> window_at(const PoolOp &op, const X *x, int64_t pixel) {
  int64_t map = int64_t(op.oh) * op.ow, image = pixel / map;
  int32_t rest = static_cast<int32_t>(pixel % map);
  int32_t y = rest / op.ow * op.stride_h - op.top, left = rest % op.ow * op.stride_w - op.left;
  int32_t y0 = y < 0 ? 0 : y, x0 = left < 0 ? 0 : left;
  int32_t y1 = y + op.kh < op.h ? y + op.kh : op.h, x1 = left + op.kw < op.w ? left + op.kw : op.w;
  Window<X> win;
  win.rows = y1 > y0 ? y1 - y0 : 0;
  win.columns = x1 > x0 ? x1 - x0 : 0;
  win.pitch = op.x.pitch;
  win.row_pitch = win.pitch * op.w;
  win.x = x + ((image * op.h + y0) * op.w + x0) * win.pitch;
  int64_t count = int64_t(win.rows) * win.columns;
  if (op.count_include_pad) {
    // The padding counts, the overhang beyond it does not.
    int32_t bottom = y + op.kh < op.h + op.bottom ? y + op.kh : op.h + op.bottom;
    int32_t right = left + op.kw < op.w + op.right ? left + op.kw : op.w + op.right;
    count = int64_t(bottom - y) * (right - left);
  }
  win.divisor = count > 0 ? static_cast<float>(count) : 1.0f;
  return win;
}

// NV vectors of channels from channel c on; `last` is how many channels the last of them has.
template <int NV, class X> inline void fold_maximum(const Window<X> &win, int32_t c, int last, Isa::V (&best)[NV]) {
  for (int v = 0; v < NV; ++v)
    best[v] = Isa::set(-__builtin_inff());
  for (int32_t i = 0; i < win.rows; ++i) {
    const X *x = win.x + i * win.row_pitch + c;
    for (int32_t j = 0; j < win.columns; ++j, x += win.pitch)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        best[v] = Isa::max_nan(best[v], read_some(x + v * Isa::lanes, v + 1 < NV ? Isa::lanes : last));
  }
}

#if defined(__AVX512BW__)
constexpr int HALF_LANES = 32;
#elif defined(__AVX2__)
constexpr int HALF_LANES = 16;
#else
constexpr int HALF_LANES = 8;
#endif

template <int Lanes> struct Halves;
template <> struct Halves<8> {
  using Bits = uint16_t __attribute__((vector_size(16)));
  using Numbers = int16_t __attribute__((vector_size(16)));
};
template <> struct Halves<16> {
  using Bits = uint16_t __attribute__((vector_size(32)));
  using Numbers = int16_t __attribute__((vector_size(32)));
};
template <> struct Halves<32> {
  using Bits = uint16_t __attribute__((vector_size(64)));
  using Numbers = int16_t __attribute__((vector_size(64)));
};

// The maximum of bfloat16 by its bits, NV vectors of channels from channel c on, of the last vector `last`. Signed, a
// maximum over anything with a clear sign is the largest number; where there is no such, it is the smallest, unsigned.
// What is unsigned above minus infinity is a NaN. Of both zeros the positive one wins.
template <int Lanes, int NV> inline void maximum_by_bits(const Window<bf16> &win, int32_t c, int last, bf16 *y) {
  using Bits = typename Halves<Lanes>::Bits;
  using Numbers = typename Halves<Lanes>::Numbers;
  constexpr uint16_t MINUS_INFINITY = 0xff80;
  Numbers largest[NV];
  Bits smallest[NV], top[NV];
  for (int v = 0; v < NV; ++v) {
    largest[v] = Numbers{} + INT16_MIN;
    smallest[v] = Bits{} + MINUS_INFINITY;
    top[v] = Bits{};
  }
  const size_t tail = sizeof(bf16) * last;
  for (int32_t i = 0; i < win.rows; ++i) {
    const bf16 *x = win.x + i * win.row_pitch + c;
    for (int32_t j = 0; j < win.columns; ++j, x += win.pitch)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        Bits bits{};
        __builtin_memcpy(&bits, x + v * Lanes, v + 1 < NV || last == Lanes ? sizeof bits : tail);
        Numbers number = Numbers(bits);
        largest[v] = number > largest[v] ? number : largest[v];
        smallest[v] = bits < smallest[v] ? bits : smallest[v];
        top[v] = bits > top[v] ? bits : top[v];
      }
  }
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    Bits found = largest[v] >= 0 ? Bits(largest[v]) : smallest[v];
    found = top[v] > MINUS_INFINITY ? top[v] : found;
    __builtin_memcpy(y + c + v * Lanes, &found, v + 1 < NV || last == Lanes ? sizeof found : tail);
  }
}

// The channels [c, end) of one pixel.
inline void maximum_by_bits(const Window<bf16> &win, int32_t c, int32_t end, bf16 *y) {
  for (; c + 2 * HALF_LANES <= end; c += 2 * HALF_LANES)
    maximum_by_bits<HALF_LANES, 2>(win, c, HALF_LANES, y);
  for (; c + 8 <= end; c += 8)
    maximum_by_bits<8, 1>(win, c, 8, y);
  if (c < end)
    maximum_by_bits<8, 1>(win, c, end - c, y);
}

template <int NV, class X> inline void fold_average(const Window<X> &win, int32_t c, int last, Isa::V (&total)[NV]) {
  for (int v = 0; v < NV; ++v)
    total[v] = Isa::zero();
  for (int32_t i = 0; i < win.rows; ++i) {
    const X *x = win.x + i * win.row_pitch + c;
    Isa::V sum[NV];
    for (int v = 0; v < NV; ++v)
      sum[v] = Isa::zero();
    for (int32_t j = 0; j < win.columns; ++j, x += win.pitch)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        sum[v] = sum[v] + read_some(x + v * Isa::lanes, v + 1 < NV ? Isa::lanes : last);
    for (int v = 0; v < NV; ++v)
      total[v] = total[v] + sum[v];
  }
  for (int v = 0; v < NV; ++v)
    total[v] = total[v] / Isa::set(win.divisor);
}

template <int NV, class X, class Y> inline void pool_channels(const PoolOp &op, const Window<X> &win, Y *y, int32_t c) {
  int32_t left = op.c - c - (NV - 1) * Isa::lanes;
  int last = left < Isa::lanes ? left : Isa::lanes;
  Isa::V value[NV];
  if (op.maximum)
    fold_maximum<NV>(win, c, last, value);
  else
    fold_average<NV>(win, c, last, value);
  for (int v = 0; v < NV; ++v) {
    int count = v + 1 < NV ? Isa::lanes : last;
    int32_t at = c + v * Isa::lanes;
    if (op.shift)
      value[v] = value[v] + read_some(op.shift + at, count);
    if (op.relu)
      value[v] = Isa::relu(value[v]);
    write_some(y + at, value[v], count);
  }
}

template <class X, class Y>
inline void pool_piece(const PoolOp &op, const Window<X> &win, Y *y, int32_t c, int32_t end) {
  if constexpr (sizeof(X) == sizeof(bf16) && sizeof(Y) == sizeof(bf16))
    if (op.maximum && !op.shift && !op.relu)
      return maximum_by_bits(win, c, end, y);
  for (; c + 4 * Isa::lanes <= end; c += 4 * Isa::lanes)
    pool_channels<4>(op, win, y, c);
  for (; c < end; c += Isa::lanes)
    pool_channels<1>(op, win, y, c);
}

template <class X, class Y> inline void pool_of(const PoolOp &op, const Call &call, const Worker &worker) {
  constexpr int32_t UNIT = 4 * Isa::lanes;
  const X *x = static_cast<const X *>(call.bases[op.x.buffer]) + op.x.offset;
  Y *y = static_cast<Y *>(call.bases[op.y.buffer]) + op.y.offset;
  int64_t pieces = (op.c + UNIT - 1) / UNIT;
  int64_t units = int64_t(op.n) * op.oh * op.ow * pieces;
  int64_t unit = units * worker.index / worker.count, end = units * (worker.index + 1) / worker.count;
  while (unit < end) {
    int64_t pixel = unit / pieces, piece = unit % pieces;
    int64_t stop = piece + end - unit < pieces ? piece + end - unit : pieces;
    Window<X> win = window_at(op, x, pixel);
    Y *target = y + pixel * op.y.pitch;
    unit += stop - piece;
    for (; piece < stop; ++piece) {
      int32_t c = static_cast<int32_t>(piece) * UNIT;
      pool_piece(op, win, target, c, c + UNIT < op.c ? c + UNIT : op.c);
    }
  }
}

void pool(const PoolOp &op, const Call &call, const Worker &worker) {
  bool from_half = op.x.type == Type::bfloat16, to_half = op.y.type == Type::bfloat16;
  if (from_half)
    to_half ? pool_of<bf16, bf16>(op, call, worker) : pool_of<bf16, float>(op, call, worker);
  else
    to_half ? pool_of<float, bf16>(op, call, worker) : pool_of<float, float>(op, call, worker);
}

} // namespace
} // namespace inception_fast::cpu
