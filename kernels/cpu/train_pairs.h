// The weights of conv.h's bfloat16 sums from float weights of any strides, as fast as they change in training.
//
// Packed: pairs of channels beside each other, [k / 2][columns][2]. Where output channels are neighbours in memory, as
// for the gradient of x of weights in channels_last, two rows of them are rounded and interleaved; where channels are,
// as for y, rows of channels are rounded and their pairs, 32 bits each, transposed.
#pragma once

#include "train_conv.h"

#include <utility>

namespace inception_fast::cpu {
namespace {

constexpr int ROWS_AHEAD = 8; // rows of channels
constexpr int PAIR_COLUMNS = 2 * Isa::lanes;

typedef uint32_t __attribute__((vector_size(sizeof(Isa::V)))) PairBits;

inline Isa::V round_row(const float *from, int count) {
  bf16 row[Isa::lanes];
  Isa::store(row, count < Isa::lanes ? Isa::load_some(from, count) : Isa::load(from));
  return Isa::load(row);
}

// Neighbours in memory are columns: to[pair][columns] of channels [low, high).
inline void interleave_rows(const TrainConvOp &op, const float *from, int width, int vectors, int32_t low, int32_t high,
                            float *to) {
  for (int32_t c = low; c < high; c += 2)
    for (int v = 0; v < vectors; ++v, to += Isa::lanes) {
      const float *first = from + c * op.channel + v * Isa::lanes;
      int count = width - v * Isa::lanes;
      __builtin_prefetch(first + ROWS_AHEAD * op.channel);
      PairBits a = (PairBits)round_row(first, count), b = {};
      if (c + 1 < high)
        b = (PairBits)round_row(first + op.channel, count);
      Isa::store(to, (Isa::V)((a >> 16) | b));
    }
}

// Rounds `count` channels of a column.
inline void round_channels(const float *from, int64_t step, int32_t count, bf16 *to) {
  if (step == 1) {
    int32_t c = 0;
    for (; c + Isa::lanes <= count; c += Isa::lanes) {
      __builtin_prefetch(from + c + SHARE); // of the next share
      Isa::store(to + c, Isa::load(from + c));
    }
    if (c < count)
      Isa::store_some(to + c, Isa::load_some(from + c, count - c), count - c);
    return;
  }
  for (int32_t c = 0; c < count; ++c)
    Isa::store_some(to + c, Isa::set(from[c * step]), 1);
}

// The lower or the upper halves of two vectors, lane by lane in turn.
template <int upper, int... i> inline Isa::V zip(Isa::V a, Isa::V b, std::integer_sequence<int, i...>) {
  constexpr int lanes = Isa::lanes;
#ifdef __clang__
  return __builtin_shufflevector(a, b, (i % 2 * lanes + i / 2 + upper * lanes / 2)...);
#else
  return __builtin_shuffle(a, b, (PairBits){(i % 2 * lanes + i / 2 + upper * lanes / 2)...});
#endif
}

// Lane i of row r becomes lane r of row i: every pass moves the first bit of (row, lane) behind the last.
inline void transpose(Isa::V (&rows)[Isa::lanes]) {
  constexpr std::make_integer_sequence<int, Isa::lanes> all;
#pragma GCC unroll 4
  for (int pass = 1; pass < Isa::lanes; pass *= 2) {
    Isa::V next[Isa::lanes];
#pragma GCC unroll 8
    for (int r = 0; r < Isa::lanes / 2; ++r) {
      next[2 * r] = zip<0>(rows[r], rows[r + Isa::lanes / 2], all);
      next[2 * r + 1] = zip<1>(rows[r], rows[r + Isa::lanes / 2], all);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Isa::lanes; ++r)
      rows[r] = next[r];
  }
}

// Any strides: to[pair][columns] of channels [low, high).
inline void transpose_columns(const TrainConvOp &op, const float *from, int width, int columns, int32_t low,
                              int32_t high, float *to) {
  alignas(64) float rounded[PAIR_COLUMNS][SHARE / 2] = {}; // an odd last channel has a zero beside it
  int32_t pairs = (high - low + 1) / 2;
  for (int i = 0; i < width; ++i)
    round_channels(from + i * op.column + low * op.channel, op.channel, high - low,
                   reinterpret_cast<bf16 *>(rounded[i]));
  for (int32_t pair = 0; pair < pairs; pair += Isa::lanes)
    for (int column = 0; column < columns; column += Isa::lanes) {
      Isa::V rows[Isa::lanes];
#pragma GCC unroll 16
      for (int r = 0; r < Isa::lanes; ++r)
        rows[r] = Isa::load(rounded[column + r] + pair);
      transpose(rows);
      float *at = to + int64_t(pair) * columns + column;
      int some = pairs - pair < Isa::lanes ? pairs - pair : Isa::lanes;
#pragma GCC unroll 16
      for (int r = 0; r < Isa::lanes; ++r)
        if (r < some)
          Isa::store(at + r * columns, rows[r]);
    }
}

inline void pack_pairs(const TrainConvOp &op, const ConvOp &conv, const Panel &panel, int32_t low, int32_t high,
                       bf16 *to) {
  int columns = panel.vectors * Isa::lanes, taps = op.kh * op.kw;
  int32_t packed = (op.c + 1) / 2 * 2;
  for (int tap = 0; tap < taps; ++tap) {
    const float *from = op.weight + panel.column * op.column + tap / op.kw * op.row + tap % op.kw * op.tap;
    int64_t k = int64_t(tap / conv.row_taps) * conv.row_depth + int64_t(tap % conv.row_taps) * packed + low;
    float *at = reinterpret_cast<float *>(to + k * columns);
    if (op.column == 1)
      interleave_rows(op, from, panel.width, panel.vectors, low, high, at);
    else
      transpose_columns(op, from, panel.width, columns, low, high, at);
  }
}

} // namespace
} // namespace inception_fast::cpu
