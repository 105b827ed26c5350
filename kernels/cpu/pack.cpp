#include "pack.h"

#include "winograd_pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace inception_fast::cpu {

std::vector<Chunk> chunks_of(Type type, int channels, int taps) {
  const int longest = type == Type::bfloat16 ? 2 * CHUNK : CHUNK;
  std::vector<Chunk> chunks;
  auto ceil_div = [](int a, int b) { return (a + b - 1) / b; };
  if (channels <= longest) {
    int count = ceil_div(taps, longest / channels), step = ceil_div(taps, count);
    for (int tap = 0; tap < taps; tap += step)
      chunks.push_back({tap, std::min(taps, tap + step), 0, channels});
    return chunks;
  }
  int pieces = ceil_div(channels, longest), step = ceil_div(ceil_div(channels, pieces), 8) * 8;
  for (int tap = 0; tap < taps; ++tap)
    for (int c = 0; c < channels; c += step)
      chunks.push_back({tap, tap + 1, c, std::min(channels, c + step)});
  return chunks;
}

constexpr int FEWEST = 16; // channels for a tile unit

void lay_out_rows(ConvOp &op, int k_multiple) {
  bool half = op.x.type == Type::bfloat16;
  int channels = op.c / op.groups, taps = op.kh * op.kw, packed = half ? (channels + 1) / 2 * 2 : channels;
  op.row_taps = taps;
  op.row_depth = int64_t(taps) * packed;
  op.tiled = half && k_multiple > 1 && channels >= FEWEST;
  if (!op.tiled)
    return;
  auto fill = [&](int64_t depth) { return (depth + k_multiple - 1) / k_multiple * k_multiple; };
  int row = op.columns ? 1 : op.kw, rows = taps / row;
  int64_t apart = rows * fill(int64_t(row) * packed), together = fill(op.row_depth);
  // Rows of taps that share a copy of x are worth some padding.
  if (4 * apart <= 5 * together)
    op.row_taps = row;
  op.row_depth = fill(int64_t(op.row_taps) * packed);
}

void join_taps(ConvOp &op, int k_multiple) {
  int row = op.kw * op.c, taps = op.kh * op.kw, all = taps * op.c;
  bool few = op.x.type == Type::bfloat16 && op.groups == 1 && op.c < FEWEST && !op.columns;
  if (!few || op.kw == 1)
    return;
  int filled = (all + k_multiple - 1) / k_multiple * k_multiple;
  if (k_multiple > 1 && 4 * all >= 3 * filled) {
    op.joined = op.tiled = true;
    op.row_taps = taps;
    op.row_depth = filled;
    return;
  }
  op.joined = op.c % 2 == 1 && all <= 2 * CHUNK;
  if (!op.joined)
    return;
  op.row_taps = op.kw;
  op.row_depth = (row + 1) / 2 * 2;
}

void walk_directly(ConvOp &op, bool padded_sideways, int rows) {
  // Down its columns, whole tiles of a 1xk kernel share the taps that lie on padding.
  op.columns = op.kh == 1 && op.kw > 1 && padded_sideways;
  // Each thread reads its share of one operand and all of the other; short of tiles, panels also share out more evenly.
  int64_t x = int64_t(op.n) * op.h * op.w * op.c, weights = int64_t(op.oc) * (op.c / op.groups) * op.kh * op.kw;
  op.by_panel = weights > x || int64_t(op.n) * op.oh * op.ow < 64 * rows;
}

// Floats behind one column of a panel's weights.
static int64_t packed_depth(const ConvOp &op) {
  if (op.depthwise)
    return int64_t(op.kh) * op.kw;
  int64_t depth = int64_t(op.kh * op.kw / op.row_taps) * op.row_depth;
  return op.x.type == Type::bfloat16 && op.tile_h == 0 ? depth / 2 : depth;
}

std::vector<Panel> panels_of(const ConvOp &op, const std::vector<Range> &ranges, int lanes) {
  std::vector<Panel> panels;
  int64_t packed = 0, first = 0;
  int groups = op.depthwise ? 1 : op.groups, per_group = op.oc / groups;
  for (int group = 0; group < groups; ++group) {
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
        packed += (packed_depth(op) + 2) * panel.vectors * lanes;
        first += panel.vectors;
      }
      range_begin = range_end;
    }
  }
  return panels;
}

int64_t packed_size(const ConvOp &op, const std::vector<Panel> &panels, int lanes) {
  return panels.back().packed + (packed_depth(op) + 2) * panels.back().vectors * lanes;
}

static bf16 rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value)
    return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

static bool is_finite(float value) { return std::isfinite(value); }
static bool is_finite(bf16 value) { return (value.bits & 0x7f80) != 0x7f80; }

static float widened(float value) { return value; }
static float widened(bf16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

static float stored(float value, float) { return value; }
static bf16 stored(float value, bf16) { return rounded(value); }

std::vector<Stretch> stretches_of(const Panel &panel, const std::vector<WeightBlock> &blocks) {
  std::vector<Stretch> found;
  int first = 0;
  for (const WeightBlock &block : blocks) {
    int low = std::max(first, panel.column), high = std::min(first + block.columns, panel.column + panel.width);
    if (low < high)
      found.push_back({block.data + (low - first) * block.column, low - panel.column, high - low, &block});
    first += block.columns;
  }
  return found;
}

// Rows of `columns` weights, `per` of them together: [k / per][columns][per]. A panel's memory is zero before.
template <class T, int per> static bool pack_weights(const ConvOp &op, const Stretch &from, int columns, T *to) {
  int channels = op.c / op.groups, taps = op.kh * op.kw;
  int packed = op.joined ? channels : (channels + per - 1) / per * per;
  const WeightBlock &block = *from.block;
  bool finite = true;
  for (int c = 0; c < channels; ++c)
    for (int tap = 0; tap < taps; ++tap) {
      int64_t k = int64_t(tap / op.row_taps) * op.row_depth + tap % op.row_taps * packed + c;
      T *row = to + (k - k % per) * columns + from.column * per + k % per;
      const float *column = from.data + c * block.channel + tap / op.kw * block.row + tap % op.kw * block.tap;
      for (int i = 0; i < from.count; ++i) {
        row[i * per] = stored(column[i * block.column], T{});
        finite &= is_finite(row[i * per]);
      }
    }
  return finite;
}

// The only channel's weights, [taps][columns], rounded to T.
template <class T> static bool pack_taps(const ConvOp &op, const Stretch &from, int columns, float *to) {
  const WeightBlock &block = *from.block;
  bool finite = true;
  for (int tap = 0; tap < op.kh * op.kw; ++tap) {
    const float *column = from.data + tap / op.kw * block.row + tap % op.kw * block.tap;
    float *row = to + int64_t(tap) * columns + from.column;
    for (int i = 0; i < from.count; ++i) {
      row[i] = widened(stored(column[i * block.column], T{}));
      finite &= is_finite(row[i]);
    }
  }
  return finite;
}

static bool pack_stretch(const ConvOp &op, const Stretch &from, int columns, float *to) {
  bool half = op.x.type == Type::bfloat16;
  if (op.tile_h > 0)
    return pack_points(op, from, columns, to);
  if (op.depthwise)
    return half ? pack_taps<bf16>(op, from, columns, to) : pack_taps<float>(op, from, columns, to);
  return half ? pack_weights<bf16, 2>(op, from, columns, reinterpret_cast<bf16 *>(to))
              : pack_weights<float, 1>(op, from, columns, to);
}

bool pack(const ConvOp &op, const Panel &panel, const Weights &from, int lanes, float *to) {
  int columns = panel.vectors * lanes;
  bool finite = true;
  std::memset(to, 0, sizeof(float) * packed_depth(op) * columns);
  for (const Stretch &stretch : stretches_of(panel, from.blocks))
    finite &= pack_stretch(op, stretch, columns, to);
  float *tail = to + packed_depth(op) * columns;
  std::fill(tail, tail + 2 * columns, 0.0f);
  std::copy_n(from.scale + panel.column, panel.width, tail);
  std::copy_n(from.shift + panel.column, panel.width, tail + columns);
  return finite;
}

} // namespace inception_fast::cpu
