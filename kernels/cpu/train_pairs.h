// The weights of conv.h's bfloat16 sums from float weights of any strides, as fast as they change in training.
//
// Packed: pairs of channels beside each other, [k / 2][columns][2]. Where output channels are neighbours in memory, as
// for the gradient of x of weights in channels_last, two rows of them are rounded and interleaved; where channels are,
// as for y, rows of channels are rounded and their pairs, 32 bits each, transposed.
#pragma once

#include "train_conv.h"

namespace inception_fast::cpu {
namespace {

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
    for (; c + Isa::lanes <= count; c += Isa::lanes)
      Isa::store(to + c, Isa::load(from + c));
    if (c < count)
      Isa::store_some(to + c, Isa::load_some(from + c, count - c), count - c);
    return;
  }
  for (int32_t c = 0; c < count; ++c)
    Isa::store_some(to + c, Isa::set(from[c * step]), 1);
}

// Any strides: to[pair][columns] of channels [low, high).
inline void transpose_columns(const TrainConvOp &op, const float *from, int width, int columns, int32_t low,
                              int32_t high, float *to) {
  alignas(64) uint32_t rounded[PAIR_COLUMNS][SHARE / 2];
  int32_t pairs = (high - low + 1) / 2;
  for (int i = 0; i < columns; ++i) {
    rounded[i][pairs - 1] = 0; // the second of an odd last one
    if (i < width)
      round_channels(from + i * op.column + low * op.channel, op.channel, high - low,
                     reinterpret_cast<bf16 *>(rounded[i]));
    else
      __builtin_memset(rounded[i], 0, pairs * sizeof(uint32_t));
  }
  for (int32_t pair = 0; pair < pairs; ++pair, to += columns)
    for (int i = 0; i < columns; ++i)
      __builtin_memcpy(to + i, &rounded[i][pair], sizeof(float));
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
