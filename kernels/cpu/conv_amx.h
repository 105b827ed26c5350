// conv.h's formula on a tile unit, for bfloat16 x: products of [16 pixels, 32 of K] by [32 of K, 16 columns], added to
// [16, 16] float32 sums.
//
// K is rows of taps, `row_depth` each; what fills a row up is zero in x and in w. It is summed in one go: 16 products
// of firsts and 16 of seconds of the pairs each by themselves, the two added, then added to the sum. So a value depends
// on nothing but its own operands here too.
//
// A block of tiles first copies the x behind it to `slots` of 32 channels, [row_depth / 32][slots][32], where every row
// of taps finds the pixels of a tile in one stretch: output pixel m's operands for row t lie at slot m + offset(t). For
// that a slot holds one row of taps of one pixel, and padding is copied as zeros; with a stride along the rows, slots
// are sorted by the phase first. A kernel of one row copies each pixel's taps, a 1x1 kernel on whole slots reads x
// where it is. Then panels pass over the block, two or three tiles by two vectors of columns at a time; the sums of one
// are rounded and stored while the next are multiplied.
#pragma once

#include "tile_multiply.h"

namespace inception_fast::cpu {
namespace {

constexpr int64_t STAGE_BYTES = 1 << 20;  // of x behind a block: half of a level 2 cache
constexpr int64_t STAGE_TILES = 128;      // at most in a block
constexpr int64_t AHEAD_BYTES = 64 << 10; // at least between the weights asked for and those at work
constexpr int64_t AHEAD_LINES = 4;        // asked for in one step
constexpr int64_t LONG_STEPS = 14;        // from here on three tiles at a time beat two
constexpr int MAX_TILES = 3;              // at a time

// Output pixels in the order of the tiles, which run through all pixels of a `map`: of one image, or, where one row
// holds all taps, of all.
struct Walk {
  int64_t maps, pixels, tiles; // pixels and tiles of each map
  int64_t inner, outer;        // an image's pixels are [outer, inner]
  int64_t rows, stride;        // rows of taps, and how far neighbours of `outer` lie apart in x
  int64_t planes;
  bool direct;

  explicit Walk(const ConvOp &op) {
    bool pointwise = op.kh * op.kw == 1 && op.stride_h * op.stride_w == 1 && op.top == 0 && op.left == 0;
    rows = op.kh * op.kw / op.row_taps;
    inner = op.columns ? op.oh : op.ow;
    outer = op.columns ? op.ow : op.oh;
    stride = op.columns ? op.stride_w : op.stride_h;
    maps = rows > 1 ? op.n : 1;
    pixels = (rows > 1 ? 1 : op.n) * inner * outer;
    tiles = ceil_div(pixels, TILE_ROWS);
    planes = op.row_depth / SLOT;
    direct = pointwise && op.oh == op.h && op.ow == op.w && op.c / op.groups % SLOT == 0;
  }

  // Phases of the stride that taps read.
  int64_t phases() const { return lesser(rows, stride); }
  // Slots of one phase, in lines of `inner`, behind `count` neighbours of `outer`.
  int64_t lines(int64_t count) const { return ceil_div((count - 1) * stride + rows, stride); }
  // The tile at the end may read on beyond its pixels.
  int64_t slots(int64_t count) const {
    if (direct)
      return TILE_ROWS;
    if (rows == 1)
      return count * TILE_ROWS;
    int64_t touched = lesser(outer, (count * TILE_ROWS - 2) / inner + 2);
    return phases() * lines(touched) * inner + TILE_ROWS;
  }
  int64_t bytes(int64_t count) const {
    return (direct ? count * TILE_ROWS : slots(count)) * planes * SLOT * int64_t(sizeof(bf16));
  }
  // What a block of this map, or of a part of it, may take: a part has blocks of its own. Two tiles touch 30 / inner +
  // 2 neighbours at most, all touch what the map has.
  int64_t most_bytes() const {
    int64_t slot = planes * SLOT * int64_t(sizeof(bf16));
    int64_t two = phases() * (30 + (1 + ceil_div(rows, stride)) * inner) + TILE_ROWS;
    int64_t all = greater(tiles * TILE_ROWS, phases() * lines(outer) * inner + TILE_ROWS);
    return slot * (lesser(all, greater(two, ceil_div(STAGE_BYTES, slot))) + 1);
  }
  int64_t block() const {
    int64_t count = lesser(STAGE_TILES, tiles);
    while (count > 2 && bytes(count) > STAGE_BYTES)
      count -= ceil_div(count, 8);
    return greater(1, count);
  }
};

// The working memory of one thread, and what of it belongs to the block at hand.
struct Stage {
  Walk walk;
  int64_t room;  // tiles
  bf16 *slots;   // [planes][plane]
  int64_t plane; // elements, an odd number of lines: the planes of a slot must not share a set of the cache
  int64_t *pixels, *rows;
  float *sums;
  Waiting waiting; // rows of `sums` that are not in y yet
  const bf16 *x;   // of the group at hand
  int64_t x_pitch;
  int64_t map, first, staged; // the first tile; the pixel in slot 0, which `direct` has in the last tile alone

  explicit Stage(const ConvOp &op) : walk(op) {}
  Depth depth() const { return {rows, walk.rows, walk.planes}; }
};

inline size_t lay_out(Stage &stage, unsigned char *scratch) {
  size_t at = 0;
  auto take = [&](int64_t bytes) {
    unsigned char *p = scratch + at;
    at += aligned(size_t(bytes));
    return p;
  };
  stage.room = stage.walk.block();
  stage.plane = (stage.walk.slots(stage.room) | 1) * SLOT;
  stage.sums =
      reinterpret_cast<float *>(take(MAX_TILES * TILE_ROWS * MAX_VECTORS * Isa::lanes * int64_t(sizeof(float))));
  stage.pixels = reinterpret_cast<int64_t *>(take(STAGE_TILES * TILE_ROWS * int64_t(sizeof(int64_t))));
  stage.rows = reinterpret_cast<int64_t *>(take(stage.walk.rows * int64_t(sizeof(int64_t))));
  stage.slots = reinterpret_cast<bf16 *>(take(stage.walk.most_bytes()));
  return at;
}

// Output pixels one after the other.
struct Cursor {
  int64_t image, outer, inner;
  const Walk &walk;

  Cursor(const Walk &walk, int64_t map, int64_t m) : walk(walk) {
    int64_t size = walk.inner * walk.outer;
    image = map + m / size;
    outer = m % size / walk.inner;
    inner = m % walk.inner;
  }
  void advance() {
    if (++inner == walk.inner) {
      inner = 0;
      if (++outer == walk.outer) {
        outer = 0;
        ++image;
      }
    }
  }
};

// Copies kh * kw taps from (y, x) on, which may lie outside the map, to one slot of every plane. `unit` divides the
// channels and 32.
template <int64_t unit>
inline void copy_taps(const ConvOp &op, const Stage &stage, int64_t image, int64_t y, int64_t x, int64_t kh, int64_t kw,
                      bf16 *slot) {
  int64_t channels = op.c / op.groups, packed = packed_channels(op), k = 0;
  auto place = [&](int64_t at) { return slot + at / SLOT * stage.plane + at % SLOT; };
  for (int64_t tap = 0; tap < kh * kw; ++tap, k += packed) {
    int64_t iy = y + tap / kw, ix = x + tap % kw, c = 0;
    if (uint64_t(iy) < uint64_t(op.h) && uint64_t(ix) < uint64_t(op.w)) {
      const bf16 *from = stage.x + ((image * op.h + iy) * op.w + ix) * op.x.pitch;
      for (; c < channels; c += unit)
        __builtin_memcpy(place(k + c), from + c, sizeof(bf16) * unit);
    }
    for (; c < packed; c += unit)
      __builtin_memset(place(k + c), 0, sizeof(bf16) * unit);
  }
  for (; k < op.row_depth; ++k)
    *place(k) = bf16{0};
}

// The pixels [m0, m1), each with all its taps.
template <int64_t unit> inline void copy_pixels(const ConvOp &op, const Stage &stage, int64_t m0, int64_t m1) {
  Cursor at(stage.walk, stage.map, m0);
  for (int64_t m = m0; m < m1; ++m, at.advance()) {
    int64_t oy = op.columns ? at.inner : at.outer, ox = op.columns ? at.outer : at.inner;
    copy_taps<unit>(op, stage, at.image, oy * op.stride_h - op.top, ox * op.stride_w - op.left, op.kh, op.kw,
                    stage.slots + (m - m0) * SLOT);
  }
}

// Lines of x behind the neighbours [o0, o1] of `outer`, each pixel with one row of taps.
template <int64_t unit> inline void copy_lines(const ConvOp &op, const Stage &stage, int64_t o0, int64_t o1) {
  const Walk &walk = stage.walk;
  int64_t lines = walk.lines(o1 - o0 + 1), kw = op.columns ? 1 : op.kw;
  for (int64_t line = 0; line < (o1 - o0) * walk.stride + walk.rows; ++line) {
    int64_t phase = line % walk.stride;
    if (phase >= walk.rows)
      continue;
    bf16 *slot = stage.slots + (phase * lines + line / walk.stride) * walk.inner * SLOT;
    int64_t along = o0 * walk.stride + line;
    for (int64_t i = 0; i < walk.inner; ++i, slot += SLOT) {
      int64_t y = op.columns ? i * op.stride_h : along, x = op.columns ? along : i * op.stride_w;
      copy_taps<unit>(op, stage, stage.map, y - op.top, x - op.left, 1, kw, slot);
    }
  }
}

template <int64_t unit> inline void copy_block(const ConvOp &op, Stage &stage, int64_t m0, int64_t m1) {
  const Walk &walk = stage.walk;
  if (walk.rows > 1) {
    int64_t o0 = m0 / walk.inner;
    copy_lines<unit>(op, stage, o0, (m1 - 1) / walk.inner);
    stage.staged = o0 * walk.inner;
  } else {
    // Of whole tiles nothing is copied where x can be read in place.
    stage.staged = walk.direct ? m1 / TILE_ROWS * TILE_ROWS : m0;
    if (stage.staged < m1)
      copy_pixels<unit>(op, stage, stage.staged, m1);
  }
}

// Makes the tiles [tile0, tile1) of a map the block at hand: x of one group, the offsets of its rows of taps, and the
// output pixels.
inline void fill(const ConvOp &op, Stage &stage, const bf16 *x, int64_t map, int64_t tile0, int64_t tile1) {
  const Walk &walk = stage.walk;
  int64_t m0 = tile0 * TILE_ROWS, m1 = lesser(walk.pixels, tile1 * TILE_ROWS), channels = op.c / op.groups;
  stage.waiting.finish_all(); // they know their pixels from `stage.pixels`
  stage.x = x;
  stage.x_pitch = op.x.pitch;
  stage.map = map;
  stage.first = tile0;
  if (channels % SLOT == 0)
    copy_block<SLOT>(op, stage, m0, m1);
  else if (channels % 8 == 0)
    copy_block<8>(op, stage, m0, m1);
  else
    copy_block<1>(op, stage, m0, m1);
  int64_t lines = walk.lines((m1 - 1) / walk.inner - m0 / walk.inner + 1);
  for (int64_t row = 0; row < walk.rows; ++row)
    stage.rows[row] = (row % walk.stride * lines + row / walk.stride) * walk.inner * SLOT;
  Cursor at(walk, map, m0);
  for (int64_t m = m0; m < m1; ++m, at.advance()) {
    int64_t oy = op.columns ? at.inner : at.outer, ox = op.columns ? at.outer : at.inner;
    stage.pixels[m - m0] = (at.image + op.y_image) * op.y_map + oy * op.y_row + ox + op.y_start;
  }
}

inline Feed feed_of(const Stage &stage, int64_t tile) {
  int64_t m = tile * TILE_ROWS;
  if (stage.walk.direct && m < stage.staged)
    return {stage.x + m * stage.x_pitch, stage.x_pitch, SLOT};
  return {stage.slots + (m - stage.staged) * SLOT, SLOT, stage.plane};
}

// M tiles of the block at hand by one panel. Their sums wait for the next block, or for whoever finishes them.
template <int M, int NV, class Y, class Tiles>
inline void tile_block(Tiles &tiles, Stage &stage, const Sink<Y> &sink, const bf16 *weights, int64_t tile,
                       Ahead &ahead) {
  Feed x[M];
  for (int m = 0; m < M; ++m)
    x[m] = feed_of(stage, tile + m);
  Pending<NV, Y> &pending = stage.waiting.of<NV, Y>();
  multiply<M, NV>(tiles, stage.depth(), x, weights, ahead, pending, stage.sums);
  pending.sink = sink;
  pending.sums = stage.sums;
  pending.pixels = stage.pixels + (tile - stage.first) * TILE_ROWS;
  pending.count = lesser(M * TILE_ROWS, stage.walk.pixels - tile * TILE_ROWS);
}

// Three tiles at a time where K is long, but never one where two and two will do.
template <int NV, class Y, class Tiles>
__attribute__((noinline)) void tile_panel(Tiles &tiles, const ConvOp &op, const Call &call, const Panel &panel,
                                          Stage &stage, int64_t low, int64_t high) {
  const bf16 *weights = reinterpret_cast<const bf16 *>(op.packed + panel.packed);
  int64_t length = stage.walk.rows * op.row_depth * NV * Isa::lanes, size = length * int64_t(sizeof(bf16));
  const Sink<Y> sink = sink_of<Y>(op, call, panel, reinterpret_cast<const float *>(weights + length));
  int64_t most = NV == 2 && stage.depth().steps() > LONG_STEPS ? 3 : 2;
  // The lines of a panel are shared out evenly, unless that is more than a step can do.
  int64_t lines = lesser(AHEAD_LINES, ceil_div(NV * TILE_ROWS, ceil_div(high - low, most)));
  const char *from = reinterpret_cast<const char *>(weights) + size * ceil_div(AHEAD_BYTES, size);
  Ahead ahead{from, lines, size / 64};
  for (int64_t tile = low, left; (left = high - tile) > 0;) {
    int64_t many = left == 4 ? 2 : lesser(left, most);
    if constexpr (NV == 2)
      if (many == 3)
        tile_block<3, NV>(tiles, stage, sink, weights, tile, ahead);
    if (many == 2)
      tile_block<2, NV>(tiles, stage, sink, weights, tile, ahead);
    else if (many == 1)
      tile_block<1, NV>(tiles, stage, sink, weights, tile, ahead);
    tile += many;
  }
}

template <class Y, class Tiles>
inline void tile_panel(Tiles &tiles, const ConvOp &op, const Call &call, const Panel &panel, Stage &stage, int64_t low,
                       int64_t high) {
  if (panel.vectors == 2)
    tile_panel<2, Y>(tiles, op, call, panel, stage, low, high);
  else
    tile_panel<1, Y>(tiles, op, call, panel, stage, low, high);
}

// All groups on the tiles [tile0, tile1) of a map.
template <class Tiles>
inline void tile_block(Tiles &tiles, const ConvOp &op, const Call &call, const Part &part, Stage &stage, int64_t map,
                       int64_t tile0, int64_t tile1) {
  const bf16 *x = static_cast<const bf16 *>(base_of(call, op.x)) + op.x.offset;
  x += int64_t(op.x_image) * op.h * op.w * op.x.pitch;
  int32_t filled = -1;
  int64_t before = map * stage.walk.tiles;
  for (int p = 0; p < op.panel_count; ++p) {
    const Panel &panel = op.panels[p];
    int64_t low = greater(tile0, part.begin(panel) - before), high = lesser(tile1, part.end(panel) - before);
    if (low >= high)
      continue;
    if (filled != panel.group)
      fill(op, stage, x + int64_t(panel.group) * (op.c / op.groups), map, tile0, tile1);
    filled = panel.group;
    if (panel.y.type == Type::bfloat16)
      tile_panel<bf16>(tiles, op, call, panel, stage, low, high);
    else
      tile_panel<float>(tiles, op, call, panel, stage, low, high);
  }
}

template <class Tiles> inline void tile_conv(const ConvOp &op, const Call &call, const Worker &worker) {
  Stage stage(op);
  int64_t all = stage.walk.maps * stage.walk.tiles;
  Part part = part_of(op, worker, all, direct_groups(op, all, worker.count));
  if (part.low >= part.high)
    return;
  lay_out(stage, worker.scratch);
  Tiles tiles;
  tiles.configure();
  for (int64_t map = 0; map < stage.walk.maps; ++map) {
    int64_t before = map * stage.walk.tiles;
    int64_t low = greater(0, part.tile0 - before), count = lesser(stage.walk.tiles, part.tile1 - before) - low;
    int64_t blocks = count > 0 ? ceil_div(count, stage.room) : 0;
    for (int64_t i = 0; i < blocks; ++i)
      tile_block(tiles, op, call, part, stage, map, low + count * i / blocks, low + count * (i + 1) / blocks);
  }
  stage.waiting.finish_all();
  tiles.release();
}

// `otherwise` does what tiles are not for.
template <class Tiles, void (*otherwise)(const ConvOp &, const Call &, const Worker &)>
inline void conv_or_tiles(const ConvOp &op, const Call &call, const Worker &worker) {
  op.tiled ? tile_conv<Tiles>(op, call, worker) : otherwise(op, call, worker);
}

inline size_t tile_scratch(const ConvOp &op) {
  if (!op.tiled)
    return conv_scratch(op);
  Stage stage(op);
  return lay_out(stage, nullptr);
}

} // namespace
} // namespace inception_fast::cpu
