// y = act(residual + residual_scale * (scale * conv(x, w) + shift)), act = ReLU or the identity, per output column
// range.
//
// x is NHWC [n, h, w, c], packed w is [panel][kh * kw * c / groups][columns], y is NHWC, each range of columns its own
// view. x and w are float32 or bfloat16, sums are float32, y is rounded once. Numbers: K runs over taps row by row,
// then channels, in every case. A fixed `Chunk` of it is summed from zero, chunks are added in order, so a value
// depends on nothing but its own operands: not on tile, block, thread or batch.
//
// Implicit GEMM without a copy of x. A tile is `rows` pixels of the flattened output map by a panel of two vectors of
// columns, held in registers. The list of where its pixels' operands lie (operands.h) is made once per block of tiles
// and serves every panel. Within a panel, chunks are outermost, so that a chunk of weights stays in the level 1 cache
// while the block's tiles pass.
#pragma once

#include "operands.h"
#include "share.h"

namespace inception_fast::cpu {
namespace {

// One chunk of one panel over some tiles of a block.
template <class T, class Y> struct Job : Sink<Y> {
  const Block<Operand<T>> *block;
  int32_t begin, begin_pitch; // this chunk's column of block->begin
  const T *weights;
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
}

// sum += x[:, k] * the first or the second of each pair of weights. Sums stay where they are: free to move, some of
// them end in memory where registers are few.
template <bool Second, int R, int NV>
__attribute__((always_inline)) inline void half_step(const float *const (&x)[R], int64_t k, const bf16 *w,
                                                     Isa::V (&sum)[R][NV]) {
  Isa::V b[NV];
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v)
    b[v] = Second ? Isa::load_second(w + v * 2 * Isa::lanes) : Isa::load_first(w + v * 2 * Isa::lanes);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    Isa::V a = Isa::set(x[r][k]);
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      sum[r][v] = Isa::fma(a, b[v], sum[r][v]);
      Isa::hold(sum[r][v]);
    }
  }
}

// The same of x widened before; the weights are as they are loaded.
template <bool Pair, int R, int NV>
__attribute__((always_inline)) inline void step(const float *const (&x)[R], int64_t k, const bf16 *w,
                                                Isa::V (&sum)[R][NV]) {
  half_step<false>(x, k, w, sum);
  if (Pair)
    half_step<true>(x, k + 1, w, sum);
}

// Asks for a line of the weights that come next, so that the level 2 cache has them by then.
inline void ask(const char *&ahead) {
  __builtin_prefetch(ahead, 0, 2);
  ahead += 64;
}

// Asks for `lines` of the weights that come next at every second channel. Always inline: called, it would have the
// sums in memory, which costs half of the speed and more.
template <int R, int NV>
__attribute__((always_inline)) inline void stretch(const float *const (&x)[R], int64_t length, const float *w,
                                                   Isa::V (&sum)[R][NV], const char *&ahead, int lines = 1) {
  int64_t k = 0;
#pragma GCC unroll 2
  for (; k + 1 < length; k += 2, w += 2 * NV * Isa::lanes) {
    for (int i = 0; i < lines; ++i)
      ask(ahead);
    step(x, k, w, sum);
    step(x, k + 1, w + NV * Isa::lanes, sum);
  }
  if (k < length)
    step(x, k, w, sum);
}

template <class X, int R, int NV>
__attribute__((always_inline)) inline void stretch(const X *const (&x)[R], int64_t length, const bf16 *w,
                                                   Isa::V (&sum)[R][NV], const char *&ahead) {
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

template <class X, class T, int R, int NV>
__attribute__((always_inline)) inline void multiply(const Segment<X> *segment, const Segment<X> *end, const T *weights,
                                                    Isa::V (&sum)[R][NV], const char *ahead) {
  for (; segment != end; ++segment) {
    const X *x[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      x[r] = segment->x[r];
    stretch(x, segment->length, weights + segment->k * (NV * Isa::lanes), sum, ahead);
  }
}

// Tiles of R pixels, of which `rows` are finished: all, or of the last tile one or more fewer.
template <int R, int NV, bool Whole, class T, class Y>
__attribute__((noinline)) void tiles(const Job<T, Y> &job, int64_t tile0, int64_t tile1, int rows) {
  const Block<Operand<T>> &block = *job.block;
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
template <int R, int NV, class T, class Y> inline void partial(const Job<T, Y> &job, int64_t tile, int rows) {
  if constexpr (R > 2)
    if (rows <= R - 2)
      return partial<R - 2, NV>(job, tile, rows);
  tiles<R, NV, false>(job, tile, tile + 1, rows);
}

template <int NV, class T, class Y>
inline void sweep(const Job<T, Y> &job, int64_t tile0, int64_t tile1, int last_rows) {
  int64_t full = last_rows < Isa::rows ? tile1 - 1 : tile1;
  tiles<Isa::rows, NV, true>(job, tile0, full, Isa::rows);
  if (full < tile1)
    partial<Isa::rows, NV>(job, full, last_rows);
}

template <class T, class Y>
inline void run_panel(const ConvOp &op, const Call &call, const Panel &panel, const Block<Operand<T>> &block,
                      int64_t tile0, int64_t tile1, int last_rows) {
  int64_t columns = int64_t(panel.vectors) * Isa::lanes;
  int64_t depth = int64_t(op.kh * op.kw / op.row_taps) * op.row_depth;
  Job<T, Y> job;
  job.weights = reinterpret_cast<const T *>(op.packed + panel.packed);
  static_cast<Sink<Y> &>(job) =
      sink_of<Y>(op, call, panel, reinterpret_cast<const float *>(job.weights + depth * columns));
  job.block = &block;
  job.begin_pitch = op.chunk_count + 1;
  job.tile0 = tile0;
  const char *weights = reinterpret_cast<const char *>(job.weights);
  for (int i = 0; i < op.chunk_count; ++i) {
    const Chunk &chunk = op.chunks[i];
    int64_t length = int64_t(chunk.tap1 - chunk.tap0) * (chunk.c1 - chunk.c0);
    int64_t end = op.joined ? depth : int64_t(chunk.tap1 - 1) * packed_channels(op) + chunk.c1;
    job.ahead = weights + end * columns * sizeof(T);
    job.ahead_step = length * columns * int64_t(sizeof(T)) / (tile1 - tile0);
    job.begin = i;
    job.first = i == 0;
    job.last = i + 1 == op.chunk_count;
    if (panel.vectors == 2)
      sweep<2>(job, tile0, tile1, last_rows);
    else
      sweep<1>(job, tile0, tile1, last_rows);
  }
}

// The panels [from, to) of one group on the tiles [tile0, tile1) of one block, whose map is made when it is first read.
template <class T>
inline void run_block(const ConvOp &op, const Call &call, const Part &part, Block<Operand<T>> &block,
                      Map<Operand<T>> &map, int from, int to, int64_t tile0, int64_t tile1) {
  int64_t m = int64_t(op.n) * op.oh * op.ow;
  bool built = false;
  for (int p = from; p < to; ++p) {
    int64_t low = greater(tile0, part.begin(op.panels[p])), high = lesser(tile1, part.end(op.panels[p]));
    if (low >= high)
      continue;
    if (!built) {
      if (!map.origin)
        map = map_of<T>(op, call, tile0, tile1, block);
      int64_t channel = int64_t(op.panels[p].group) * (op.c / op.groups);
      build(op, Map<Operand<T>>{map.origin + channel, map.row, map.pitch}, tile0, tile1, block);
      built = true;
    }
    int last_rows = static_cast<int>(lesser(Isa::rows, m - (high - 1) * Isa::rows));
    if (op.panels[p].y.type == Type::bfloat16)
      run_panel<T, bf16>(op, call, op.panels[p], block, low - tile0, high - tile0, last_rows);
    else
      run_panel<T, float>(op, call, op.panels[p], block, low - tile0, high - tile0, last_rows);
  }
}

// T: the type of x and of the weights.
template <class T> inline void conv_of(const ConvOp &op, const Call &call, const Worker &worker) {
  int64_t tiles = tile_count(op);
  Part part = direct_part(op, worker, tiles);
  if (part.low >= part.high)
    return;
  Block<Operand<T>> block;
  lay_out<T>(op, worker.scratch, block);
  int64_t count = part.tile1 - part.tile0, blocks = ceil_div(count, block.tiles);
  for (int64_t i = 0; i < blocks; ++i) {
    int64_t tile0 = part.tile0 + count * i / blocks, tile1 = part.tile0 + count * (i + 1) / blocks;
    Map<Operand<T>> map{};
    for (int from = 0; from < op.panel_count;) {
      int to = from + 1;
      while (to < op.panel_count && op.panels[to].group == op.panels[from].group)
        ++to;
      run_block<T>(op, call, part, block, map, from, to, tile0, tile1);
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
