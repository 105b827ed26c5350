// Where the operands of a convolution's tiles lie in memory.
//
// A tile is `rows` pixels of the flattened output map. Its operands are a list of `Segment`s: one per tap, or one for
// several taps where they are neighbours in memory. A pixel whose tap lies on padding points at zeros; a tap that lies
// on padding for the whole tile is left out. A tier that multiplies no pairs of bfloat16 widens the part of x that a
// block of tiles reads into the thread's memory first: once, where its products would widen every value for each tap
// and panel. Where taps are `joined`, every tier copies that part, and beside its rows zeros for the padding.
#pragma once

#include "sink.h"
#include "spec.h"

namespace inception_fast::cpu {
namespace {

constexpr int MAX_VECTORS = 2;
constexpr int64_t BLOCK_BYTES = 256 << 10; // of x behind a block: it should stay in the level 2 cache
constexpr int64_t BLOCK_MIN = 12, BLOCK_MAX = 48;
constexpr int64_t SEGMENTS_MAX = 1024;

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t within(int64_t at, int64_t low, int64_t high) { return lesser(greater(at, low), high); }

// What x is multiplied as beside weights stored as T.
template <class T, bool dots> struct Multiplied {
  using X = T;
};
template <> struct Multiplied<bf16, false> {
  using X = float;
};
template <class T> using Operand = typename Multiplied<T, Isa::dots>::X;

template <class X> struct Segment {
  int64_t k;
  int64_t length;
  const X *x[Isa::rows];
};

// The working memory of one thread: everything is indexed by the tile's place in its block.
template <class X> struct Block {
  int64_t tiles;        // room
  Segment<X> *segments; // of all tiles, in tile and then in K order
  int32_t *begin;       // [tiles][chunks + 1] into segments
  int64_t *pixels;      // [tiles][rows] flattened output positions
  float *sums;          // [tiles][rows][MAX_VECTORS * lanes]
  X *copied;            // the block's part of x, where it is not read as it is
};

// Pixels of all images, whose rows are counted through.
template <class X> struct Map {
  const X *origin;    // pixel (0, 0), which may lie outside of what is there; null: no map yet
  int64_t row, pitch; // pixels from row to row, elements from pixel to pixel

  const X *at(int64_t y, int64_t x) const { return origin + (y * row + x) * pitch; }
};

// Channels of a group as the weights count them: bfloat16 comes in pairs.
inline int32_t packed_channels(const ConvOp &op) {
  int32_t channels = op.c / op.groups;
  return op.x.type == Type::bfloat16 ? (channels + 1) / 2 * 2 : channels;
}

inline int64_t tile_count(const ConvOp &op) { return ceil_div(int64_t(op.n) * op.oh * op.ow, Isa::rows); }

inline int64_t segments_per_tile(const ConvOp &op) {
  if (op.joined)
    return op.kh;
  int64_t count = 0;
  for (int i = 0; i < op.chunk_count; ++i)
    count += op.chunks[i].tap1 - op.chunks[i].tap0;
  return count;
}

template <class X> inline int64_t block_tiles(const ConvOp &op) {
  int64_t bytes = int64_t(sizeof(X)) * Isa::rows * op.c * op.stride_h * op.stride_w;
  int64_t room = lesser(BLOCK_MAX, greater(BLOCK_MIN, BLOCK_BYTES / bytes));
  room = lesser(room, greater(1, SEGMENTS_MAX / segments_per_tile(op)));
  return greater(1, lesser(room, tile_count(op)));
}

// The rows and columns of x that some tiles read.
struct Box {
  int64_t top, bottom, left, right;
};

inline Box box_of(const ConvOp &op, int64_t tile0, int64_t tile1) {
  int64_t map = int64_t(op.oh) * op.ow, inner = op.columns ? op.oh : op.ow;
  int64_t first = tile0 * Isa::rows, last = lesser(tile1 * Isa::rows, op.n * map) - 1;
  int64_t image0 = first / map, image1 = last / map, o0 = first % map / inner, o1 = last % map / inner;
  Box box{image0 * op.h, (image1 + 1) * op.h, 0, op.w};
  if (!op.columns) {
    box.bottom = image1 * op.h + within(o1 * op.stride_h - op.top + op.kh, 0, op.h);
    box.top += within(o0 * op.stride_h - op.top, 0, op.h);
  } else if (image0 == image1) {
    box.left = within(o0 * op.stride_w - op.left, 0, op.w);
    box.right = within(o1 * op.stride_w - op.left + op.kw, 0, op.w);
  }
  return {box.top + op.x_image * op.h, box.bottom + op.x_image * op.h, box.left, box.right};
}

// At least the pixels in the box of any `tiles` neighbours.
inline int64_t box_room(const ConvOp &op, int64_t tiles) {
  int64_t pixels = tiles * Isa::rows, map = int64_t(op.oh) * op.ow;
  int64_t images = lesser(op.n, ceil_div(pixels - 1, map) + 1), all = images * op.h * op.w;
  if (op.strips)
    return all;
  if (!op.columns)
    return lesser(all, ((ceil_div(pixels - 1, op.ow) + 1) * op.stride_h + images * op.kh) * op.w);
  return images > 1 ? all : lesser(all, ((ceil_div(pixels - 1, op.oh) + 1) * op.stride_w + op.kw) * op.h);
}

// Floats from pixel to pixel of a widened map: lines 4,096 bytes apart would share a set of the level 1 cache.
inline int64_t widened_pitch(const ConvOp &op) { return op.c % 1024 ? op.c : op.c + 16; }

inline void widen(const bf16 *from, int64_t count, float *to) {
  int64_t i = 0;
  for (; i + Isa::lanes <= count; i += Isa::lanes)
    Isa::store(to + i, Isa::load(from + i));
  if (i < count)
    Isa::store_some(to + i, Isa::load_some(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
}

// The part of x that the tiles [tile0, tile1) read.
inline Map<float> widen(const ConvOp &op, const Map<bf16> &x, int64_t tile0, int64_t tile1, float *to) {
  Box box = box_of(op, tile0, tile1);
  int64_t columns = box.right - box.left, pitch = widened_pitch(op);
  bool dense = x.pitch == op.c && pitch == op.c;
  for (int64_t row = box.top; row < box.bottom; ++row) {
    float *at = to + (row - box.top) * columns * pitch;
    if (dense)
      widen(x.at(row, box.left), columns * pitch, at);
    for (int64_t i = 0; i < (dense ? 0 : columns); ++i)
      widen(x.at(row, box.left + i), op.c, at + i * pitch);
  }
  return {to - (box.top * columns + box.left) * pitch, columns, pitch};
}

// Pixels of a row of x that joined taps read, from `left` before the map on.
inline int64_t joined_row(const ConvOp &op) { return int64_t(op.ow - 1) * op.stride_w + op.kw; }

inline void copy(const float *from, int64_t count, float *to) { __builtin_memcpy(to, from, count * sizeof *to); }
inline void copy(const bf16 *from, int64_t count, bf16 *to) { __builtin_memcpy(to, from, count * sizeof *to); }
inline void copy(const bf16 *from, int64_t count, float *to) { widen(from, count, to); }

// The part of x that the tiles [tile0, tile1) read, its rows as joined taps read them; a strip's may begin inside the
// map.
template <class T, class X> inline Map<X> join(const ConvOp &op, const Map<T> &x, int64_t tile0, int64_t tile1, X *to) {
  Box box = box_of(op, tile0, tile1);
  int64_t row = joined_row(op), before = within(op.left, 0, row), first = greater(0, -int64_t(op.left));
  int64_t inside = within(op.w - first, 0, row - before), behind = row - before - inside;
  for (int64_t y = box.top; y < box.bottom; ++y) {
    X *at = to + (y - box.top) * row * op.c;
    __builtin_memset(at, 0, before * op.c * sizeof(X));
    at += before * op.c;
    if (x.pitch == op.c)
      copy(x.at(y, first), inside * op.c, at);
    for (int64_t i = 0; i < (x.pitch == op.c ? 0 : inside); ++i)
      copy(x.at(y, first + i), op.c, at + i * op.c);
    __builtin_memset(at + inside * op.c, 0, behind * op.c * sizeof(X));
  }
  return {to + (op.left - box.top * row) * op.c, row, op.c};
}

// What the tiles [tile0, tile1) read of x.
template <class T>
inline Map<Operand<T>> map_of(const ConvOp &op, const Call &call, int64_t tile0, int64_t tile1,
                              const Block<Operand<T>> &block) {
  Map<T> x{static_cast<const T *>(base_of(call, op.x)) + op.x.offset, op.w, op.x.pitch};
  if (op.joined)
    return join(op, x, tile0, tile1, block.copied);
  if constexpr (sizeof(Operand<T>) > sizeof(T))
    return widen(op, x, tile0, tile1, block.copied);
  else
    return x;
}

inline size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// T: the type of the weights.
template <class T, class X = Operand<T>>
inline size_t lay_out(const ConvOp &op, unsigned char *scratch, Block<X> &block) {
  size_t at = 0;
  auto take = [&](size_t bytes) {
    unsigned char *p = scratch + at;
    at += aligned(bytes);
    return p;
  };
  size_t tiles = block.tiles = block_tiles<X>(op);
  block.sums = reinterpret_cast<float *>(take(tiles * Isa::rows * MAX_VECTORS * Isa::lanes * sizeof(float)));
  block.segments = reinterpret_cast<Segment<X> *>(take(tiles * segments_per_tile(op) * sizeof(Segment<X>)));
  block.pixels = reinterpret_cast<int64_t *>(take(tiles * Isa::rows * sizeof(int64_t)));
  block.begin = reinterpret_cast<int32_t *>(take(tiles * (op.chunk_count + 1) * sizeof(int32_t)));
  int64_t copied = op.joined               ? ceil_div(box_room(op, tiles), op.w) * joined_row(op) * op.c
                   : sizeof(X) > sizeof(T) ? box_room(op, tiles) * widened_pitch(op)
                                           : 0;
  block.copied = reinterpret_cast<X *>(take(copied * sizeof(X)));
  return at;
}

inline size_t conv_scratch(const ConvOp &op) {
  if (op.x.type == Type::bfloat16) {
    Block<Operand<bf16>> block;
    return lay_out<bf16>(op, nullptr, block);
  }
  Block<float> block;
  return lay_out<float>(op, nullptr, block);
}

// Where one tile's pixels are: the position of tap (0, 0), which may lie outside the map. The last tile of a map may
// hold fewer pixels than others; an even number of `rows` is multiplied, of which the last may be the one before.
template <class X> struct Tile {
  int rows;
  int32_t y[Isa::rows], x[Isa::rows];
  const X *at[Isa::rows];
  int32_t y_low, y_high, x_low, x_high;
};

template <class X> inline void place(const ConvOp &op, const Map<X> &x, int64_t tile, int64_t *pixels, Tile<X> &t) {
  int64_t map = int64_t(op.oh) * op.ow, m = tile * Isa::rows;
  int rows = static_cast<int>(lesser(Isa::rows, op.n * map - m));
  t.rows = (rows + 1) / 2 * 2;
  int64_t image = m / map, rest = m % map;
  int32_t inner = op.columns ? op.oh : op.ow;
  int32_t i = static_cast<int32_t>(rest % inner), o = static_cast<int32_t>(rest / inner);
  t.y_low = t.x_low = INT32_MAX;
  t.y_high = t.x_high = INT32_MIN;
  for (int r = 0; r < rows; ++r) {
    int32_t oy = op.columns ? i : o, ox = op.columns ? o : i;
    pixels[r] = (image + op.y_image) * op.y_map + oy * op.y_row + ox + op.y_start;
    int32_t iy = t.y[r] = oy * op.stride_h - op.top, ix = t.x[r] = ox * op.stride_w - op.left;
    t.at[r] = x.at((image + op.x_image) * op.h + iy, ix);
    t.y_low = iy < t.y_low ? iy : t.y_low;
    t.y_high = iy > t.y_high ? iy : t.y_high;
    t.x_low = ix < t.x_low ? ix : t.x_low;
    t.x_high = ix > t.x_high ? ix : t.x_high;
    if (++i == inner) {
      i = 0;
      if (++o == (op.columns ? op.ow : op.oh)) {
        o = 0;
        ++image;
      }
    }
  }
  if (rows < t.rows) {
    t.y[rows] = t.y[rows - 1];
    t.x[rows] = t.x[rows - 1];
    t.at[rows] = t.at[rows - 1];
  }
}

// Points the segment at tap (kh, kw) from channel c on. Returns whether any pixel of the tile has the tap on the map.
template <class X>
inline bool aim(const ConvOp &op, const Map<X> &x, const Tile<X> &t, int32_t kh, int32_t kw, int32_t c,
                Segment<X> &segment) {
  int64_t offset = (kh * x.row + kw) * x.pitch + c;
  bool any = false;
  for (int r = 0; r < t.rows; ++r) {
    bool in = uint32_t(t.y[r] + kh) < uint32_t(op.h) && uint32_t(t.x[r] + kw) < uint32_t(op.w);
    segment.x[r] = in ? t.at[r] + offset : reinterpret_cast<const X *>(ZEROS);
    any |= in;
  }
  return any;
}

// Rows of joined taps, of which those on padding for the whole tile are left out.
template <class X>
inline Segment<X> *list_rows(const ConvOp &op, const Map<X> &x, const Tile<X> &t, Segment<X> *segment) {
  for (int32_t kh = 0; kh < op.kh; ++kh) {
    bool any = !op.skip;
    for (int r = 0; r < t.rows; ++r) {
      bool in = uint32_t(t.y[r] + kh) < uint32_t(op.h);
      segment->x[r] = in ? t.at[r] + kh * x.row * x.pitch : reinterpret_cast<const X *>(ZEROS);
      any |= in;
    }
    segment->k = kh * op.row_depth;
    segment->length = int64_t(op.kw) * op.c;
    segment += any;
  }
  return segment;
}

template <class X>
inline Segment<X> *list(const ConvOp &op, const Map<X> &x, const Tile<X> &t, const Chunk &chunk, Segment<X> *segment) {
  if (op.joined)
    return list_rows(op, x, t, segment);
  int32_t channels = op.c / op.groups, packed = packed_channels(op);
  bool x_inside = t.x_low >= 0 && t.x_high + op.kw <= op.w;
  bool neighbours = x_inside && x.pitch == channels && packed == channels;
  for (int32_t tap = chunk.tap0; tap < chunk.tap1;) {
    int32_t kh = tap / op.kw, kw = tap % op.kw;
    int32_t taps = 1;
    bool any = true;
    if (x_inside && t.y_low + kh >= 0 && t.y_high + kh < op.h) {
      int64_t offset = (kh * x.row + kw) * x.pitch + chunk.c0;
      for (int r = 0; r < t.rows; ++r)
        segment->x[r] = t.at[r] + offset;
      if (neighbours && chunk.tap1 - chunk.tap0 > 1)
        taps = static_cast<int32_t>(lesser(op.kw - kw, chunk.tap1 - tap));
    } else {
      any = aim(op, x, t, kh, kw, chunk.c0, *segment) || !op.skip;
    }
    segment->k = int64_t(tap) * packed + chunk.c0;
    segment->length = taps > 1 ? int64_t(taps) * channels : chunk.c1 - chunk.c0;
    segment += any;
    tap += taps;
  }
  return segment;
}

template <class X> inline void build(const ConvOp &op, const Map<X> &x, int64_t tile0, int64_t tile1, Block<X> &block) {
  Segment<X> *segment = block.segments;
  int32_t *begin = block.begin;
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    Tile<X> t;
    place(op, x, tile, block.pixels + (tile - tile0) * Isa::rows, t);
    for (int i = 0; i < op.chunk_count; ++i) {
      *begin++ = static_cast<int32_t>(segment - block.segments);
      segment = list(op, x, t, op.chunks[i], segment);
    }
    *begin++ = static_cast<int32_t>(segment - block.segments);
  }
}

} // namespace
} // namespace inception_fast::cpu
