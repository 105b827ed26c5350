// conv.h's formula on a tile unit, for bfloat16 x: products of [16 pixels, 32 of K] by [32 of K, 16 columns], added to
// [16, 16] float32 sums.
//
// K is rows of taps, `row_depth` each; what fills a row up is zero in x and in w. It is summed in one go: 16 products
// of firsts and 16 of seconds of the pairs each by themselves, the two added, then added to the sum. So a value depends
// on nothing but its own operands here too.
//
// A block of tiles first copies the x behind it, line by line of output pixels, to memory where all x of a row of taps
// follow each other. Output pixel m's operands for row t lie m * pitch + offset(t) behind the first, so that those of a
// tile's 16 pixels are one tile's rows. Where taps overlap, a line is a line of x between zeros, which two lines share:
// some pixels of such a map lie between two lines, and nothing is kept of them. Where that would be many, every output
// pixel has a copy of its own of each of its rows of taps. With a stride from line to line, lines are sorted by the
// phase first. A kernel of one row copies each pixel's taps, a 1x1 kernel on whole slots reads x where it is. Then
// panels pass over the block, two or three tiles by two vectors of columns at a time; the sums of one are rounded and
// stored while the next are multiplied.
#pragma once

#include "tile_multiply.h"

namespace inception_fast::cpu {
namespace {

constexpr int64_t STAGE_BYTES = 1 << 20;  // of x behind a block: half of a level 2 cache
constexpr int64_t STAGE_TILES = 128;      // at most in a block
constexpr int64_t AHEAD_BYTES = 32 << 10; // at least between the weights asked for and those at work
constexpr int64_t AHEAD_LINES = 32;       // at most asked for in one step: all of a step's weights
constexpr int64_t LONG_STEPS = 20;        // from here on three tiles at a time beat two
constexpr int MAX_TILES = 3;              // at a time

inline int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

// Elements from one copied pixel to the next. Tile rows a multiple of 8 lines of the cache apart would share its sets.
inline int64_t apart(int64_t depth) { return depth % (8 * SLOT) == 0 ? depth + SLOT : depth; }

inline int64_t tap_depth(const ConvOp &op) { return op.joined ? op.c : packed_channels(op); }

// Output pixels in the order of the tiles, which run through all pixels of a `map`: of one image, or, where one row
// holds all taps, of all.
struct Walk {
  int64_t maps, pixels, tiles; // pixels and tiles of each map, with those between lines
  int64_t inner, outer, line;  // an image's pixels are [outer, inner]; neighbours of `outer` lie `line` apart
  int64_t rows, stride;        // rows of taps, and how far neighbours of `outer` lie apart in x
  int64_t before, extent;      // lines of padding before x, and lines of x
  int64_t span;                // pixels of a copied line where taps overlap, else 0
  int64_t step;                // elements from the x of a pixel to that of the next
  int64_t depth, filled;       // of a row of taps: whole slots, and elements of one more
  bool direct;

  explicit Walk(const ConvOp &op) {
    bool pointwise = op.kh * op.kw == 1 && op.stride_h * op.stride_w == 1 && op.top == 0 && op.left == 0;
    int64_t channels = tap_depth(op);
    rows = op.kh * op.kw / op.row_taps;
    inner = op.columns ? op.oh : op.ow;
    outer = op.columns ? op.ow : op.oh;
    stride = op.columns ? op.stride_w : op.stride_h;
    before = op.columns ? op.left : op.top;
    extent = op.columns ? op.w : op.h;
    direct = pointwise && op.oh == op.h && op.ow == op.w && op.c / op.groups % SLOT == 0;
    maps = rows > 1 ? op.n : 1;
    line = inner;
    span = rows > 1 && op.row_taps > 1 && !op.strips ? overlapping(op) : 0;
    if (span > 0)
      line = span / op.stride_w;
    step = span > 0 ? op.stride_w * channels : apart(op.row_depth);
    depth = (span > 0 ? op.row_taps * channels : op.row_depth) / SLOT;
    filled = span > 0 ? op.row_taps * channels % SLOT : 0;
    pixels = rows > 1 ? (outer - 1) * line + inner : op.n * inner * outer;
    tiles = ceil_div(pixels, TILE_ROWS);
  }

  // Pixels of x in a line, a multiple of the stride: zeros to the left of one are those to the right of the one before.
  // 0 where it takes more than 6 % more tiles than pixels do.
  int64_t overlapping(const ConvOp &op) const {
    int64_t reach = (inner - 1) * op.stride_w + op.kw;
    int64_t before = greater(0, op.left), behind = greater(0, reach - op.left - op.w);
    int64_t shared = lesser(op.kw - 1, lesser(before, behind));
    int64_t found = round_up(reach - shared, op.stride_w);
    int64_t with = ceil_div((outer - 1) * (found / op.stride_w) + inner, TILE_ROWS);
    return 16 * with <= 17 * ceil_div(outer * inner, TILE_ROWS) ? found : 0;
  }
  // Phases of the stride that taps read.
  int64_t phases() const { return lesser(rows, stride); }
  // Lines of one phase behind `count` neighbours of `outer`.
  int64_t lines(int64_t count) const { return ceil_div((count - 1) * stride + rows, stride); }
  int64_t line_at(int64_t index, int64_t count) const { return index % stride * lines(count) + index / stride; }
  // Pixels of the copy behind `count` neighbours of `outer`.
  int64_t copied(int64_t count) const { return phases() * lines(count) * line; }
  int64_t held(int64_t count) const {
    if (direct)
      return TILE_ROWS;
    return rows > 1 ? copied(lesser(outer, (count * TILE_ROWS - 2) / line + 2)) : count * TILE_ROWS;
  }
  // Elements of the copy of so many pixels and of the tile at the end, which may read on behind its pixels.
  int64_t elements(int64_t held) const { return (held + TILE_ROWS) * step + (depth + 1) * SLOT; }
  int64_t bytes(int64_t count) const {
    int64_t seen = direct ? count * TILE_ROWS * step : elements(held(count));
    return (seen + (filled ? (held(count) + TILE_ROWS) * SLOT : 0)) * int64_t(sizeof(bf16));
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
  int64_t room;   // tiles
  bf16 *x, *ends; // copies of x, and of what does not fill a slot: [pixel][32]
  int64_t *pixels;
  int32_t *places, *begin; // of each pixel that is kept, in the block; the first of each tile
  Row *rows;
  float *sums;
  Waiting waiting;            // rows of `sums` that are not in y yet
  const bf16 *from;           // of the group at hand
  int64_t pitch;              // of `from`
  int64_t map, first, staged; // the first tile; the pixel that is copied first, of `direct` in the last tile alone
  bool skip;                  // rows of taps that lie on padding for all pixels of a block of tiles

  explicit Stage(const ConvOp &op) : walk(op), skip(op.skip) {}
  // All of K, or what the pixels [m0, m1) need of it.
  Depth depth() const { return {rows, 0, walk.rows, walk.depth, walk.filled > 0}; }
  Depth depth(int64_t m0, int64_t m1) const {
    Depth found = depth();
    if (skip && walk.rows > 1) {
      int64_t low = m0 / walk.line * walk.stride - walk.before, high = (m1 - 1) / walk.line * walk.stride - walk.before;
      found.first = greater(0, lesser(walk.rows, -high));
      found.last = greater(found.first, lesser(walk.rows, walk.extent - low));
    }
    return found;
  }
};

inline size_t lay_out(Stage &stage, unsigned char *scratch) {
  const Walk &walk = stage.walk;
  size_t at = 0;
  auto take = [&](auto *&p, int64_t count) {
    p = static_cast<decltype(&*p)>(static_cast<void *>(scratch + at));
    at += aligned(size_t(count) * sizeof *p);
  };
  stage.room = walk.block();
  int64_t held = walk.held(stage.room);
  take(stage.sums, MAX_TILES * TILE_ROWS * MAX_VECTORS * Isa::lanes);
  take(stage.pixels, (STAGE_TILES + 1) * TILE_ROWS);
  take(stage.places, STAGE_TILES * TILE_ROWS);
  take(stage.begin, STAGE_TILES + 1);
  take(stage.rows, walk.rows);
  take(stage.x, walk.elements(held));
  take(stage.ends, walk.filled ? (held + TILE_ROWS) * SLOT : 0);
  return at;
}

// Output pixels one after the other, with those between lines.
struct Cursor {
  int64_t image, outer, inner;
  const Walk &walk;

  Cursor(const Walk &walk, int64_t map, int64_t m) : walk(walk) {
    int64_t size = walk.line * walk.outer;
    image = map + m / size;
    outer = m % size / walk.line;
    inner = m % walk.line;
  }
  bool kept() const { return inner < walk.inner; }
  void advance() {
    if (++inner == walk.line) {
      inner = 0;
      if (++outer == walk.outer) {
        outer = 0;
        ++image;
      }
    }
  }
};

// `size` to 2 `size` elements, as two copies that may overlap.
template <int64_t size> inline void copy_both(bf16 *to, const bf16 *from, int64_t count) {
  __builtin_memcpy(to, from, size * sizeof(bf16));
  __builtin_memcpy(to + count - size, from + count - size, size * sizeof(bf16));
}

// Any number, without the call of a library for a few.
inline void copy_elements(bf16 *to, const bf16 *from, int64_t count) {
  for (; count > SLOT; count -= SLOT, to += SLOT, from += SLOT)
    __builtin_memcpy(to, from, SLOT * sizeof(bf16));
  if (count >= 16)
    copy_both<16>(to, from, count);
  else if (count >= 8)
    copy_both<8>(to, from, count);
  else if (count >= 4)
    copy_both<4>(to, from, count);
  else
    for (int64_t i = 0; i < count; ++i)
      to[i] = from[i];
}

inline void clear(bf16 *to, int64_t count) { __builtin_memset(to, 0, size_t(count) * sizeof(bf16)); }

// Copies `taps` neighbours along a row of x from (y, x) on, which may lie outside the map. Returns where it ends.
inline bf16 *copy_taps(const ConvOp &op, const Stage &stage, int64_t image, int64_t y, int64_t x, int64_t taps,
                       bf16 *to) {
  int64_t channels = op.c / op.groups, packed = tap_depth(op);
  int64_t low = greater(0, -x), high = lesser(taps, op.w - x);
  bf16 *end = to + taps * packed;
  if (uint64_t(y) >= uint64_t(op.h) || low >= high) {
    clear(to, taps * packed);
    return end;
  }
  clear(to, low * packed);
  const bf16 *from = stage.from + ((image * op.h + y) * op.w + x + low) * stage.pitch;
  to += low * packed;
  if (stage.pitch == channels && packed == channels) {
    copy_elements(to, from, (high - low) * channels);
    to += (high - low) * channels;
  } else {
    for (int64_t tap = low; tap < high; ++tap, to += packed, from += stage.pitch) {
      copy_elements(to, from, channels);
      if (channels < packed)
        to[channels] = bf16{0};
    }
  }
  clear(to, end - to);
  return end;
}

// All taps of a pixel from (y, x) on, whose rows of fewer than 16 elements lie inside the map, with a row of it below
// them. What a row copies too many, and zeros that are too many, the next ones replace.
inline void copy_short_rows(const ConvOp &op, const Stage &stage, int64_t image, int64_t y, int64_t x, bf16 *to) {
  constexpr int64_t room = SLOT / 2;
  int64_t row = op.kw * stage.pitch, k = 0;
  const bf16 *from = stage.from + ((image * op.h + y) * op.w + x) * stage.pitch;
  for (int64_t ky = 0; ky < op.kh; ++ky, k += row, from += op.w * stage.pitch)
    __builtin_memcpy(to + k, from, room * sizeof(bf16));
  for (; k < op.row_depth; k += room)
    __builtin_memset(to + k, 0, room * sizeof(bf16));
}

// The pixels [m0, m1), each with all its taps.
inline void copy_pixels(const ConvOp &op, const Stage &stage, int64_t m0, int64_t m1) {
  Cursor at(stage.walk, stage.map, m0);
  bool dense = op.groups == 1 && stage.pitch == tap_depth(op) && op.w * stage.pitch >= SLOT;
  bool fits = dense && op.kw * stage.pitch < SLOT / 2 && !op.columns;
  bf16 *to = stage.x;
  for (int64_t m = m0; m < m1; ++m, at.advance(), to += stage.walk.step) {
    int64_t oy = op.columns ? at.inner : at.outer, ox = op.columns ? at.outer : at.inner;
    int64_t y = oy * op.stride_h - op.top, x = ox * op.stride_w - op.left;
    if (fits && y >= 0 && x >= 0 && y + op.kh < op.h && x + op.kw <= op.w) {
      copy_short_rows(op, stage, at.image, y, x, to);
      continue;
    }
    bf16 *end = to;
    for (int64_t ky = 0; ky < op.kh; ++ky)
      end = copy_taps(op, stage, at.image, y + ky, x, op.kw, end);
    clear(end, to + op.row_depth - end);
  }
}

// Lines of x behind the neighbours [o0, o1] of `outer`, each pixel with one row of taps.
inline void copy_lines(const ConvOp &op, const Stage &stage, int64_t o0, int64_t o1) {
  const Walk &walk = stage.walk;
  int64_t count = o1 - o0 + 1, last = (count - 1) * walk.stride + walk.rows;
  for (int64_t index = 0; index < last; ++index) {
    if (index % walk.stride >= walk.rows)
      continue;
    bf16 *to = stage.x + walk.line_at(index, count) * walk.line * walk.step;
    int64_t along = o0 * walk.stride + index;
    if (walk.span > 0) {
      copy_taps(op, stage, stage.map, along - op.top, -op.left, (walk.inner - 1) * op.stride_w + op.kw, to);
      continue;
    }
    for (int64_t i = 0; i < walk.inner; ++i, to += walk.step) {
      int64_t y = op.columns ? i * op.stride_h : along, x = op.columns ? along : i * op.stride_w;
      bf16 *end = copy_taps(op, stage, stage.map, y - op.top, x - op.left, op.row_taps, to);
      clear(end, to + op.row_depth - end);
    }
  }
}

// What is left of each pixel's row of taps behind whole slots, filled up with zeros.
inline void copy_ends(const Stage &stage, int64_t count) {
  const bf16 *from = stage.x + stage.walk.depth * SLOT;
  int64_t held = stage.walk.copied(count), filled = stage.walk.filled;
  for (int64_t i = 0; i < held; ++i, from += stage.walk.step) {
    bf16 slot[SLOT] = {};
    __builtin_memcpy(slot, from, size_t(filled) * sizeof(bf16));
    __builtin_memcpy(stage.ends + i * SLOT, slot, sizeof slot);
  }
}

inline void copy_block(const ConvOp &op, Stage &stage, int64_t m0, int64_t m1) {
  const Walk &walk = stage.walk;
  if (walk.rows == 1) {
    // Of whole tiles nothing is copied where x can be read in place.
    stage.staged = walk.direct ? m1 / TILE_ROWS * TILE_ROWS : m0;
    if (stage.staged < m1)
      copy_pixels(op, stage, stage.staged, m1);
    return;
  }
  int64_t o0 = m0 / walk.line, o1 = (m1 - 1) / walk.line, count = o1 - o0 + 1;
  copy_lines(op, stage, o0, o1);
  if (walk.filled > 0)
    copy_ends(stage, count);
  stage.staged = o0 * walk.line;
  for (int64_t row = 0; row < walk.rows; ++row) {
    int64_t pixel = walk.line_at(row, count) * walk.line;
    stage.rows[row] = {pixel * walk.step, pixel * SLOT};
  }
}

// Makes the tiles [tile0, tile1) of a map the block at hand: x of one group, the offsets of its rows of taps, and the
// output pixels.
template <class Tiles>
inline void fill(Tiles &tiles, const ConvOp &op, Stage &stage, const bf16 *x, int64_t map, int64_t tile0,
                 int64_t tile1) {
  const Walk &walk = stage.walk;
  int64_t m0 = tile0 * TILE_ROWS, m1 = lesser(walk.pixels, tile1 * TILE_ROWS);
  stage.waiting.finish_all(tiles); // they know their pixels from `stage.pixels`
  stage.from = x;
  stage.pitch = op.x.pitch;
  stage.map = map;
  stage.first = tile0;
  stage.rows[0] = {0, 0};
  copy_block(op, stage, m0, m1);
  Cursor at(walk, map, m0);
  int32_t kept = 0;
  for (int64_t m = m0; m < m1; ++m, at.advance()) {
    if ((m - m0) % TILE_ROWS == 0)
      stage.begin[(m - m0) / TILE_ROWS] = kept;
    if (!at.kept())
      continue;
    int64_t oy = op.columns ? at.inner : at.outer, ox = op.columns ? at.outer : at.inner;
    stage.places[kept] = static_cast<int32_t>(m - m0);
    stage.pixels[kept++] = (at.image + op.y_image) * op.y_map + oy * op.y_row + ox + op.y_start;
  }
  stage.begin[tile1 - tile0] = kept;
  for (int64_t i = 0; i < TILE_ROWS; ++i) // which a finisher may look at, ahead of its rows
    stage.pixels[kept + i] = kept > 0 ? stage.pixels[kept - 1] : 0;
}

inline Feed feed_of(const Stage &stage, int64_t tile) {
  const Walk &walk = stage.walk;
  int64_t m = tile * TILE_ROWS, at = m - stage.staged;
  if (walk.direct && at < 0)
    return {stage.from + m * stage.pitch, stage.pitch, nullptr};
  return {stage.x + at * walk.step, walk.step, stage.ends + at * SLOT};
}

// M tiles of the block at hand by one panel. Their sums wait for the next block, or for whoever finishes them.
template <int M, int NV, class Y, class Tiles>
inline void tile_block(Tiles &tiles, Stage &stage, const Sink<Y> &sink, const bf16 *weights, int64_t tile,
                       Ahead &ahead) {
  Feed x[M];
  for (int m = 0; m < M; ++m)
    x[m] = feed_of(stage, tile + m);
  Pending<NV, Y> &pending = stage.waiting.of<NV, Y>(tiles);
  const Depth depth = stage.depth(tile * TILE_ROWS, lesser(stage.walk.pixels, (tile + M) * TILE_ROWS));
  multiply<M, NV>(tiles, depth, x, weights, ahead, pending);
  int64_t place = tile - stage.first;
  pending.sink = sink;
  pending.pixels = stage.pixels + stage.begin[place];
  pending.places = stage.places + stage.begin[place];
  pending.count = stage.begin[place + M] - stage.begin[place];
  pending.room = stage.sums;
  pending.sums = stage.sums - place * TILE_ROWS * NV * Isa::lanes;
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
      fill(tiles, op, stage, x + int64_t(panel.group) * (op.c / op.groups), map, tile0, tile1);
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
  stage.waiting.finish_all(tiles);
  tiles.release();
}

// `otherwise` does what tiles are not for.
template <class Tiles, void (*otherwise)(const ConvOp &, const Call &, const Worker &)>
inline void conv_or_tiles(const ConvOp &op, const Call &call, const Worker &worker) {
  op.tiled ? tile_conv<Tiles>(op, call, worker) : otherwise(op, call, worker);
}

// Strips of a map may need more than all of it, for blocks end where they do.
inline size_t tile_scratch(const ConvOp &op) {
  if (!op.tiled)
    return conv_scratch(op);
  Stage stage(op);
  size_t most = lay_out(stage, nullptr);
  if (op.strips) {
    auto widen = [&](const ConvOp &part) {
      Stage stage(part);
      size_t found = lay_out(stage, nullptr);
      most = found > most ? found : most;
    };
    ConvOp part = op;
    for (part.ow = 1; part.ow <= op.ow; ++part.ow)
      widen(part);
    part = op;
    for (part.oh = 1; part.oh <= op.oh; ++part.oh)
      widen(part);
  }
  return most;
}

} // namespace
} // namespace inception_fast::cpu
