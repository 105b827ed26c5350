// Weights in the order in which the convolution kernel reads them.
#pragma once

#include "spec.h"

#include <vector>

namespace inception_fast::cpu {

// The stretches of K = kh * kw * channels that are summed from zero: whole taps, or equal parts of one.
std::vector<Chunk> chunks_of(Type type, int channels, int taps);

// Sets `tiled`, `row_taps` and `row_depth`; `columns` must be set. Few channels are left to `join_taps`: what a tile
// unit would be fed with is padding, and a copy of its own.
void lay_out_rows(ConvOp &op, int k_multiple);

// Sets `joined` where it pays, after the others. Few channels of all taps together may fill what a tile unit
// multiplies; elsewhere pairs of bfloat16 straddle the taps of a row, whose channels are few and odd, in place of one
// of zeros at each tap.
void join_taps(ConvOp &op, int k_multiple);

// Sets `columns` and `by_panel` of a direct sum: how tiles walk the map and what threads share out.
void walk_directly(ConvOp &op, bool padded_sideways, int rows);

// A range of output channels with a destination of its own.
struct Range {
  View y;
  bool relu;
};

// Panels in group and then in channel order; none straddles two groups or two ranges. `packed` counts from the
// operator's start.
std::vector<Panel> panels_of(const ConvOp &op, const std::vector<Range> &ranges, int lanes);

// Floats behind all panels of an operator.
int64_t packed_size(const ConvOp &op, const std::vector<Panel> &panels, int lanes);

// Weights of some output channels, [columns, c / groups, kh, kw], by strides in floats.
struct WeightBlock {
  const float *data;
  int32_t columns;
  int64_t column, channel, row, tap;
};

// What the caller hands in: blocks of output channels that follow each other, oc of them in all, and [oc], [oc].
struct Weights {
  std::vector<WeightBlock> blocks;
  const float *scale, *shift;
};

// Columns of a panel that lie in one block: `count` from `column` of the panel on, whose first weight is `data`.
struct Stretch {
  const float *data;
  int column, count;
  const WeightBlock *block;
};

std::vector<Stretch> stretches_of(const Panel &panel, const std::vector<WeightBlock> &blocks);

// Fills one panel. Returns whether all its weights are finite.
bool pack(const ConvOp &op, const Panel &panel, const Weights &from, int lanes, float *to);

} // namespace inception_fast::cpu
