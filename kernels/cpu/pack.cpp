#include "pack.h"

#include <algorithm>
#include <cmath>

namespace inception_fast::cpu {

std::vector<Chunk> chunks_of(int channels, int taps) {
  std::vector<Chunk> chunks;
  auto ceil_div = [](int a, int b) { return (a + b - 1) / b; };
  if (channels <= CHUNK) {
    int count = ceil_div(taps, CHUNK / channels), step = ceil_div(taps, count);
    for (int tap = 0; tap < taps; tap += step)
      chunks.push_back({tap, std::min(taps, tap + step), 0, channels});
    return chunks;
  }
  int pieces = ceil_div(channels, CHUNK), step = ceil_div(ceil_div(channels, pieces), 8) * 8;
  for (int tap = 0; tap < taps; ++tap)
    for (int c = 0; c < channels; c += step)
      chunks.push_back({tap, tap + 1, c, std::min(channels, c + step)});
  return chunks;
}

static int64_t depth_of(const ConvOp &op) { return int64_t(op.kh) * op.kw * (op.c / op.groups); }

std::vector<Panel> panels_of(const ConvOp &op, const std::vector<Range> &ranges, int lanes) {
  std::vector<Panel> panels;
  int64_t packed = 0, first = 0;
  int per_group = op.oc / op.groups;
  for (int group = 0; group < op.groups; ++group) {
    int range_begin = 0;
    for (const Range &range : ranges) {
      int range_end = range_begin + range.y.channels;
      int begin = std::max(range_begin, group * per_group), end = std::min(range_end, (group + 1) * per_group);
      for (int column = begin; column < end; column += 2 * lanes) {
        Panel panel{};
        panel.packed = packed;
        panel.first = first;
        panel.group = group;
        panel.column = column;
        panel.width = std::min(2 * lanes, end - column);
        panel.vectors = panel.width > lanes ? 2 : 1;
        panel.y = range.y;
        panel.y.offset += column - range_begin;
        panel.y.channels = panel.width;
        panel.relu = range.relu;
        panels.push_back(panel);
        packed += (depth_of(op) + 2) * panel.vectors * lanes;
        first += panel.vectors;
      }
      range_begin = range_end;
    }
  }
  return panels;
}

int64_t packed_size(const ConvOp &op, const std::vector<Panel> &panels, int lanes) {
  return panels.back().packed + (depth_of(op) + 2) * panels.back().vectors * lanes;
}

bool pack(const ConvOp &op, const Panel &panel, const Weights &from, int lanes, float *to) {
  int columns = panel.vectors * lanes, channels = op.c / op.groups, taps = op.kh * op.kw;
  const float *weight = from.weight + panel.column * depth_of(op);
  float check = 0; // times zero, any infinity or NaN makes the sum a NaN
  for (int c = 0; c < channels; ++c)
    for (int tap = 0; tap < taps; ++tap) {
      float *row = to + (int64_t(tap) * channels + c) * columns;
      const float *column = weight + int64_t(c) * taps + tap;
      for (int i = 0; i < panel.width; ++i) {
        row[i] = column[i * depth_of(op)];
        check += 0.0f * row[i];
      }
      std::fill(row + panel.width, row + columns, 0.0f);
    }
  float *tail = to + depth_of(op) * columns;
  std::fill(tail, tail + 2 * columns, 0.0f);
  std::copy_n(from.scale + panel.column, panel.width, tail);
  std::copy_n(from.shift + panel.column, panel.width, tail + columns);
  return !std::isnan(check);
}

} // namespace inception_fast::cpu
