// y = act(residual + residual_scale * (scale * conv(x, w) + shift)), act = ReLU or the identity, per output column
// range.
//
// x is NHWC [n, h, w, c], packed w is [panel][kh * kw * c / groups][columns], y is NHWC, each range of columns its own
// view. x and w are float32 or bfloat16, sums are float32, y is rounded once. Numbers: K runs over taps row by row,
// then channels, in every case. A fixed `Chunk` of it is summed from zero, chunks are added in order, so a value
// depends on nothing but its own operands: not on tile, block, thread or batch.
//
// Implicit GEMM without a copy of x. A tile is `rows` pixels of the flattened output map by a panel of two vectors of
// columns, held in registers. Per tile a list of `Segment`s says where its pixels' operands lie: one per tap, or one
// for several taps where they are neighbours in memory. A pixel whose tap lies on padding points at zeros; a tap that
// lies on padding for the whole tile is left out. The list is made once per block of tiles and serves every panel.
// Within a panel, chunks are outermost, so that a chunk of weights stays in the level 1 cache while the block's tiles
// pass.
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
};

// Channels of a group as the weights count them: bfloat16 comes in pairs.
template <class X> inline int32_t packed_channels(const ConvOp &op) {
  int32_t channels = op.c / op.groups;
  return sizeof(X) == sizeof(bf16) ? (channels + 1) / 2 * 2 : channels;
}

inline int64_t tile_count(const ConvOp &op) { return ceil_div(int64_t(op.n) * op.oh * op.ow, Isa::rows); }

inline int64_t segments_per_tile(const ConvOp &op) {
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

inline size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

template <class X> inline size_t lay_out(const ConvOp &op, unsigned char *scratch, Block<X> &block) {
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
  return at;
}

inline size_t conv_scratch(const ConvOp &op) {
  if (op.x.type == Type::bfloat16) {
    Block<bf16> block;
    return lay_out(op, nullptr, block);
  }
  Block<float> block;
  return lay_out(op, nullptr, block);
}

// Where one tile's pixels are: the position of tap (0, 0), which may lie outside the map. The last tile of a map may
// hold fewer pixels than others; an even number of `rows` is multiplied, of which the last may be the one before.
template <class X> struct Tile {
  int rows;
  int32_t y[Isa::rows], x[Isa::rows];
  const X *at[Isa::rows];
  int32_t y_low, y_high, x_low, x_high;
};

template <class X> inline void place(const ConvOp &op, const X *x, int64_t tile, int64_t *pixels, Tile<X> &t) {
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
    t.at[r] = x + (((image + op.x_image) * op.h + iy) * op.w + ix) * op.x.pitch;
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
inline bool aim(const ConvOp &op, const Tile<X> &t, int32_t kh, int32_t kw, int32_t c, Segment<X> &segment) {
  int64_t offset = (int64_t(kh) * op.w + kw) * op.x.pitch + c;
  bool any = false;
  for (int r = 0; r < t.rows; ++r) {
    bool in = uint32_t(t.y[r] + kh) < uint32_t(op.h) && uint32_t(t.x[r] + kw) < uint32_t(op.w);
    segment.x[r] = in ? t.at[r] + offset : reinterpret_cast<const X *>(ZEROS);
    any |= in;
  }
  return any;
}

template <class X>
inline Segment<X> *list(const ConvOp &op, const Tile<X> &t, const Chunk &chunk, Segment<X> *segment) {
  int32_t channels = op.c / op.groups, packed = packed_channels<X>(op);
  bool x_inside = t.x_low >= 0 && t.x_high + op.kw <= op.w;
  bool neighbours = x_inside && op.x.pitch == channels && packed == channels;
  for (int32_t tap = chunk.tap0; tap < chunk.tap1;) {
    int32_t kh = tap / op.kw, kw = tap % op.kw;
    int32_t taps = 1;
    bool any = true;
    if (x_inside && t.y_low + kh >= 0 && t.y_high + kh < op.h) {
      int64_t offset = (int64_t(kh) * op.w + kw) * op.x.pitch + chunk.c0;
      for (int r = 0; r < t.rows; ++r)
        segment->x[r] = t.at[r] + offset;
      if (neighbours && chunk.tap1 - chunk.tap0 > 1)
        taps = static_cast<int32_t>(lesser(op.kw - kw, chunk.tap1 - tap));
    } else {
      any = aim(op, t, kh, kw, chunk.c0, *segment) || !op.skip;
    }
    segment->k = int64_t(tap) * packed + chunk.c0;
    segment->length = taps > 1 ? int64_t(taps) * channels : chunk.c1 - chunk.c0;
    segment += any;
    tap += taps;
  }
  return segment;
}

template <class X> inline void build(const ConvOp &op, const X *x, int64_t tile0, int64_t tile1, Block<X> &block) {
  Segment<X> *segment = block.segments;
  int32_t *begin = block.begin;
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    Tile<X> t;
    place(op, x, tile, block.pixels + (tile - tile0) * Isa::rows, t);
    for (int i = 0; i < op.chunk_count; ++i) {
      *begin++ = static_cast<int32_t>(segment - block.segments);
      segment = list(op, t, op.chunks[i], segment);
    }
    *begin++ = static_cast<int32_t>(segment - block.segments);
  }
}

// One chunk of one panel over some tiles of a block.
template <class X, class Y> struct Job : Sink<Y> {
  const Block<X> *block;
  int32_t begin, begin_pitch; // this chunk's column of block->begin
  const X *weights;
  const char *ahead; // the weights after this chunk's, of which every tile from tile0 on asks for its share
  int64_t ahead_step, tile0;
  bool first, last;
};

// sum += x[:, k] * w[k, :]
template <int R, int NV>
__attribute__((always_inline)) inline void step(const float *const (&x)[R], int64_t k, const float *w,
                                                Isa::V (&sum)[R][NV]) {
  Isa::V b[NV];
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v)
    b[v] = Isa::load(w + v * Isa::lanes);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    Isa::V a = Isa::set(x[r][k]);
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v)
      sum[r][v] = Isa::fma(a, b[v], sum[r][v]);
  }
}

// sum += x[:, k] * w[k, :] + x[:, k + 1] * w[k + 1, :], the second only where there is a pair.
template <bool Pair, class I = Isa, int R, int NV>
inline void step(const bf16 *const (&x)[R], int64_t k, const bf16 *w, typename I::V (&sum)[R][NV]) {
  if constexpr (I::dots) {
    typename I::Pairs b[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v)
      b[v] = I::load_pairs(w + v * 2 * I::lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      typename I::Pairs a = Pair ? I::set_pair(x[r] + k) : I::set_single(x[r] + k);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        sum[r][v] = I::dot(a, b[v], sum[r][v]);
    }
  } else {
#pragma GCC unroll 2
    for (int half = 0; half < (Pair ? 2 : 1); ++half) {
      typename I::V b[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        b[v] = half ? I::load_second(w + v * 2 * I::lanes) : I::load_first(w + v * 2 * I::lanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        typename I::V a = I::set(x[r][k + half]);
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v)
          sum[r][v] = I::fma(a, b[v], sum[r][v]);
      }
    }
  }
}

// Asks for a line of the weights that come next, so that the level 2 cache has them by then.
inline void ask(const char *&ahead) {
  __builtin_prefetch(ahead, 0, 2);
  ahead += 64;
}

// Always inline: called, it would have the sums in memory, which costs half of the speed and more.
template <int R, int NV>
__attribute__((always_inline)) inline void stretch(const float *const (&x)[R], int64_t length, const float *w,
                                                   Isa::V (&sum)[R][NV], const char *&ahead) {
  int64_t k = 0;
#pragma GCC unroll 2
  for (; k + 1 < length; k += 2, w += 2 * NV * Isa::lanes) {
    ask(ahead);
    step(x, k, w, sum);
    step(x, k + 1, w + NV * Isa::lanes, sum);
  }
  if (k < length)
    step(x, k, w, sum);
}

template <int R, int NV>
inline void stretch(const bf16 *const (&x)[R], int64_t length, const bf16 *w, Isa::V (&sum)[R][NV],
                    const char *&ahead) {
  int64_t k = 0;
  for (; k + 3 < length; k += 4, w += 4 * NV * Isa::lanes) {
    ask(ahead);
    step<true>(x, k, w, sum);
    step<true>(x, k + 2, w + 2 * NV * Isa::lanes, sum);
  }
  for (; k + 1 < length; k += 2, w += 2 * NV * Isa::lanes)
    step<true>(x, k, w, sum);
  if (k < length)
    step<false>(x, k, w, sum);
}

template <class X, int R, int NV>
inline void multiply(const Segment<X> *segment, const Segment<X> *end, const X *weights, Isa::V (&sum)[R][NV],
                     const char *ahead) {
  for (; segment != end; ++segment) {
    const X *x[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      x[r] = segment->x[r];
    stretch(x, segment->length, weights + segment->k * (NV * Isa::lanes), sum, ahead);
  }
}

// Tiles of R pixels, of which `rows` are finished: all, or of the last tile one or more fewer.
template <int R, int NV, bool Whole, class X, class Y>
__attribute__((noinline)) void tiles(const Job<X, Y> &job, int64_t tile0, int64_t tile1, int rows) {
  const Block<X> &block = *job.block;
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    const int32_t *begin = block.begin + tile * job.begin_pitch + job.begin;
    if (begin[0] == begin[1] && !job.first && !job.last)
      continue;
    const int64_t *pixels = block.pixels + tile * Isa::rows;
    if (job.last && job.residual)
      for (int r = 0; r < (Whole ? R : rows); ++r)
        ask_residual(job, pixels[r]);
    Isa::V sum[R][NV];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        sum[r][v] = Isa::zero();
    multiply(block.segments + begin[0], block.segments + begin[1], job.weights, sum,
             job.ahead + (tile - job.tile0) * job.ahead_step);
    float *sums = block.sums + tile * (Isa::rows * MAX_VECTORS * Isa::lanes);
    if (!job.first) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v)
          sum[r][v] = Isa::load(sums + (r * NV + v) * Isa::lanes) + sum[r][v];
    }
    if (Whole && job.last && !job.residual) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        finish<NV, Y, false>(job, pixels[r], sum[r], Columns<NV>(job.scale), Columns<NV>(job.shift));
      continue;
    }
    // Residuals take more registers than sums leave.
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        Isa::store(sums + (r * NV + v) * Isa::lanes, sum[r][v]);
    if (job.last)
      finish_rows<NV, Y>(job, pixels, sums, rows);
  }
}

// The last tile of the map may hold fewer pixels than the others: rounded up to even, which halves what is compiled.
template <int R, int NV, class X, class Y> inline void partial(const Job<X, Y> &job, int64_t tile, int rows) {
  if constexpr (R > 2)
    if (rows <= R - 2)
      return partial<R - 2, NV>(job, tile, rows);
  tiles<R, NV, false>(job, tile, tile + 1, rows);
}

template <int NV, class X, class Y>
inline void sweep(const Job<X, Y> &job, int64_t tile0, int64_t tile1, int last_rows) {
  int64_t full = last_rows < Isa::rows ? tile1 - 1 : tile1;
  tiles<Isa::rows, NV, true>(job, tile0, full, Isa::rows);
  if (full < tile1)
    partial<Isa::rows, NV>(job, full, last_rows);
}

template <class X, class Y>
inline void run_panel(const ConvOp &op, const Call &call, const Panel &panel, const Block<X> &block, int64_t tile0,
                      int64_t tile1, int last_rows) {
  int64_t columns = int64_t(panel.vectors) * Isa::lanes;
  int64_t depth = int64_t(op.kh) * op.kw * packed_channels<X>(op);
  Job<X, Y> job;
  job.weights = reinterpret_cast<const X *>(op.packed + panel.packed);
  static_cast<Sink<Y> &>(job) =
      sink_of<Y>(op, call, panel, reinterpret_cast<const float *>(job.weights + depth * columns));
  job.block = &block;
  job.begin_pitch = op.chunk_count + 1;
  job.tile0 = tile0;
  const char *weights = reinterpret_cast<const char *>(job.weights);
  for (int i = 0; i < op.chunk_count; ++i) {
    const Chunk &chunk = op.chunks[i];
    int64_t length = int64_t(chunk.tap1 - chunk.tap0) * (chunk.c1 - chunk.c0);
    int64_t end = int64_t(chunk.tap1 - 1) * packed_channels<X>(op) + chunk.c1;
    job.ahead = weights + end * columns * sizeof(X);
    job.ahead_step = length * columns * int64_t(sizeof(X)) / (tile1 - tile0);
    job.begin = i;
    job.first = i == 0;
    job.last = i + 1 == op.chunk_count;
    if (panel.vectors == 2)
      sweep<2>(job, tile0, tile1, last_rows);
    else
      sweep<1>(job, tile0, tile1, last_rows);
  }
}

// A thread's part: a range of the products of tiles by vectors, counted panel by panel, or a range of tiles.
struct Part {
  int64_t tiles, low, high;
  bool by_panel;

  int64_t cut(const Panel &panel, int64_t at) const {
    if (!by_panel)
      return at;
    int64_t inside = ceil_div(at - panel.first * tiles, panel.vectors);
    return lesser(tiles, greater(0, inside));
  }
  int64_t begin(const Panel &panel) const { return cut(panel, low); }
  int64_t end(const Panel &panel) const { return cut(panel, high); }
};

inline Part part_of(const ConvOp &op, const Worker &worker, int64_t tiles) {
  const Panel &last = op.panels[op.panel_count - 1];
  Part part;
  part.tiles = tiles;
  part.by_panel = op.by_panel;
  int64_t units = part.tiles * (op.by_panel ? last.first + last.vectors : 1);
  part.low = units * worker.index / worker.count;
  part.high = units * (worker.index + 1) / worker.count;
  return part;
}

// The panels [from, to) of one group on the tiles [tile0, tile1) of one block.
template <class X>
inline void run_block(const ConvOp &op, const Call &call, const Part &part, Block<X> &block, int from, int to,
                      int64_t tile0, int64_t tile1) {
  int64_t m = int64_t(op.n) * op.oh * op.ow;
  bool built = false;
  for (int p = from; p < to; ++p) {
    int64_t low = greater(tile0, part.begin(op.panels[p])), high = lesser(tile1, part.end(op.panels[p]));
    if (low >= high)
      continue;
    if (!built) {
      int64_t channel = int64_t(op.panels[p].group) * (op.c / op.groups);
      build(op, static_cast<const X *>(base_of(call, op.x)) + op.x.offset + channel, tile0, tile1, block);
      built = true;
    }
    int last_rows = static_cast<int>(lesser(Isa::rows, m - (high - 1) * Isa::rows));
    if (op.panels[p].y.type == Type::bfloat16)
      run_panel<X, bf16>(op, call, op.panels[p], block, low - tile0, high - tile0, last_rows);
    else
      run_panel<X, float>(op, call, op.panels[p], block, low - tile0, high - tile0, last_rows);
  }
}

template <class X> inline void conv_of(const ConvOp &op, const Call &call, const Worker &worker) {
  Part part = part_of(op, worker, tile_count(op));
  if (part.low >= part.high)
    return;
  Block<X> block;
  lay_out(op, worker.scratch, block);
  int64_t begin = part.by_panel ? 0 : part.low, end = part.by_panel ? part.tiles : part.high;
  int64_t blocks = ceil_div(end - begin, block.tiles);
  for (int64_t i = 0; i < blocks; ++i) {
    int64_t tile0 = begin + (end - begin) * i / blocks, tile1 = begin + (end - begin) * (i + 1) / blocks;
    for (int from = 0; from < op.panel_count;) {
      int to = from + 1;
      while (to < op.panel_count && op.panels[to].group == op.panels[from].group)
        ++to;
      run_block(op, call, part, block, from, to, tile0, tile1);
      from = to;
    }
  }
}

inline void conv(const ConvOp &op, const Call &call, const Worker &worker) {
  if (op.x.type == Type::bfloat16)
    conv_of<bf16>(op, call, worker);
  else
    conv_of<float>(op, call, worker);
}

} // namespace
} // namespace inception_fast::cpu
