// The weight gradient of weight_gradient.h for stride 1 by fewer products: winograd.h's algorithm, turned.
//
// With y = A'[(G w) . (B' x)] of winograd_axis.h, dw = G'[sum over tiles of (A g) . (B' x)] for the gradient g of y:
// sums[p] is a product of matrices over the tiles of all images, at each of the nh * nw points p, and G' passes once
// over its result. Shapes: see winograd_gradient_op.h. Maps may be bfloat16; all else is float32.
//
// Numbers: another rounding than the direct sum's, with a budget of its own; of 2x2 tiles for 3x3 all coefficients are
// exact. A block of tiles is summed from zero in float, in order; blocks are added up in order, and so are chunks of
// them. An infinity or NaN of x may reach every tap of its channel.
//
// A block's tiles are transformed, then multiplied by (point, panel of two vectors of c, tile of `rows` output
// channels): the panel stays in the level 1 cache. Workers share both, or take whole chunks: see winograd_gradient.cpp.
#pragma once

#include "weight_gradient.h"
#include "winograd.h"
#include "winograd_gradient_op.h"

namespace inception_fast::cpu {
namespace {

// u = A g along one axis, elements of g and u `step` apart.
template <class A, int step> inline void evaluate(const Isa::V *g, Isa::V *u) {
  if constexpr (A::n == 1) {
    u[0] = g[0];
  } else {
    u[0] = g[0];
#pragma GCC unroll 8
    for (int pair = 0; pair < A::pairs; ++pair) {
      Isa::V even = g[0], odd = Isa::set(A::table.power[pair][1]) * g[step];
#pragma GCC unroll 8
      for (int i = 2; i < A::M; ++i) {
        Isa::V &part = i % 2 ? odd : even;
        part = Isa::fma(Isa::set(A::table.power[pair][i]), g[i * step], part);
      }
      u[(2 * pair + 1) * step] = even + odd;
      u[(2 * pair + 2) * step] = even - odd;
    }
    u[(A::n - 1) * step] = g[(A::M - 1) * step];
  }
}

// w = G' m along one axis.
template <class A, int step> inline void interpolate(const Isa::V *m, Isa::V *w) {
  if constexpr (A::n == 1) {
    w[0] = m[0];
  } else {
    Isa::V sum[A::pairs], difference[A::pairs];
#pragma GCC unroll 8
    for (int pair = 0; pair < A::pairs; ++pair) {
      sum[pair] = m[(2 * pair + 1) * step] + m[(2 * pair + 2) * step];
      difference[pair] = m[(2 * pair + 1) * step] - m[(2 * pair + 2) * step];
    }
#pragma GCC unroll 8
    for (int tap = 0; tap < A::R; ++tap) {
      const Isa::V *part = tap % 2 ? difference : sum;
      Isa::V value = Isa::set(A::table.weight[0][tap]) * part[0];
#pragma GCC unroll 8
      for (int pair = 1; pair < A::pairs; ++pair)
        value = Isa::fma(Isa::set(A::table.weight[pair][tap]), part[pair], value);
      if (tap == 0)
        value = Isa::fma(Isa::set(A::table.zero), m[0], value);
      w[tap * step] = tap == A::R - 1 ? value + m[(A::n - 1) * step] : value;
    }
  }
}

template <class H, class W, class T> struct GradientTiles {
  static constexpr int P = H::n * W::n;
  using Forward = Winograd<H, W>;

  // The pixels of a tile: [H, W] of a map of `channels`, the map's `zeros` outside of it.
  template <int NH, int NW> struct Pixels {
    const T *map, *zeros;
    int64_t pitch;
    int32_t h, w, channels;
    const T *at[NH * NW];

    void find(int64_t image, int32_t y, int32_t x) {
      const T *corner = map + ((image * h + y) * w + x) * pitch;
      bool inside = y >= 0 && x >= 0 && y + NH <= h && x + NW <= w;
      for (int i = 0; i < NH; ++i, corner += w * pitch)
        for (int j = 0; j < NW; ++j) {
          bool in = inside || (uint32_t(y + i) < uint32_t(h) && uint32_t(x + j) < uint32_t(w));
          at[i * NW + j] = in ? corner + j * pitch : zeros;
        }
    }
    // Asks for those of its last `New` columns: their reads, a line of each pixel at a time, are too few at once.
    template <int New> void ask() const {
      for (int i = 0; i < NH; ++i)
        for (int j = NW - New; j < NW; ++j)
          for (int32_t c = 0; c < channels; c += 64 / int(sizeof(T)))
            __builtin_prefetch(at[i * NW + j] + c, 0, 2);
    }
  };

  // Tile `at` of the block of x: v = B' x B.
  static void transform_x(const GradientTilesOp &op, const T *const *from, int64_t at) {
    for (int32_t c = 0; c < op.of.c; c += Isa::lanes) {
      Isa::V part[P];
      int some = op.of.c - c;
      for (int p = 0; p < P; ++p)
        part[p] = read_some(from[p] + c, some);
      int32_t vector = c / Isa::lanes, together = op.vectors - vector / 2 * 2 > 1 ? 2 : 1;
      float *to = op.x + vector / 2 * op.depth * WIDE + (at * together + vector % 2) * Isa::lanes;
      Forward::inputs(part, to, op.x_apart);
    }
  }

  // Tile `at` of the block of the gradient: u = A g A', its channels in tiles of rows, zeros from oc on.
  static void transform_gradient(const GradientTilesOp &op, const T *const *from, int64_t at) {
    constexpr int M = H::M * W::M;
    const int64_t apart = op.grad_apart;
    int32_t rows = op.of.rows;
    float *tile = op.grad + at * rows;
    for (int32_t row = 0; row < op.of.oc; row += rows, tile += op.depth * rows)
      for (int32_t r = 0; r < rows; r += Isa::lanes) {
        Isa::V g[M], half[H::n * W::M], u[P];
        int some = static_cast<int>(lesser_of(rows - r, Isa::lanes)), left = op.of.oc - row - r;
#pragma GCC unroll 36
        for (int i = 0; i < M; ++i)
          g[i] = left > 0 ? Isa::load_some(from[i] + row + r, left < some ? left : some) : Isa::zero();
#pragma GCC unroll 8
        for (int j = 0; j < W::M; ++j)
          evaluate<H, W::M>(g + j, half + j);
#pragma GCC unroll 8
        for (int i = 0; i < H::n; ++i)
          evaluate<W, 1>(half + i * W::M, u + i * W::n);
        float *to = tile + r;
#pragma GCC unroll 64
        for (int p = 0; p < P; ++p, to += apart)
          write_some(to, u[p], some);
      }
  }

  struct Tile {
    Pixels<H::n, W::n> x;
    Pixels<H::M, W::M> grad;

    explicit Tile(const GradientTilesOp &op)
        : x{static_cast<const T *>(op.of.x), zeros(op), op.of.x_pitch, op.of.h, op.of.w, op.of.c, {}},
          grad{static_cast<const T *>(op.of.grad), zeros(op), op.of.grad_pitch, op.of.oh, op.of.ow, op.of.oc, {}} {}

    static const T *zeros(const GradientTilesOp &op) { return reinterpret_cast<const T *>(op.zeros); }

    void find(const GradientTilesOp &op, int64_t tile) {
      int64_t across = (op.of.ow + W::M - 1) / W::M, down = (op.of.oh + H::M - 1) / H::M,
              image = tile / (across * down);
      int32_t oy = static_cast<int32_t>(tile / across % down) * H::M, ox = static_cast<int32_t>(tile % across) * W::M;
      x.find(image, oy - op.of.top, ox - op.of.left);
      grad.find(image, oy, ox);
      x.template ask<W::M>();
      grad.template ask<W::M>();
    }
  };

  static void transform(const GradientTilesOp &op, const Worker &worker) {
    int64_t length = op.end - op.begin;
    int64_t low = length * worker.index / worker.count, high = length * (worker.index + 1) / worker.count;
    if (low == high)
      return;
    Tile tile(op), next(op);
    next.find(op, op.begin + low);
    for (int64_t at = low; at < high; ++at) {
      tile = next;
      if (at + 1 < high)
        next.find(op, op.begin + at + 1);
      transform_x(op, tile.x.at, at);
      transform_gradient(op, tile.grad.at, at);
    }
  }
};

// dw = G' sums G, a worker a range of output channels.
template <class H, class W> void finish_tiles(const GradientTilesOp &op, const Worker &worker) {
  constexpr int P = H::n * W::n, taps = H::R * W::R;
  const WeightGradientOp &of = op.of;
  int64_t pitch = int64_t(op.vectors) * Isa::lanes, total = int64_t(of.oc) * op.vectors;
  int64_t low = total * worker.index / worker.count, high = total * (worker.index + 1) / worker.count;
  for (int64_t each = low; each < high; ++each) {
    int64_t oc = each / op.vectors, c = each % op.vectors * Isa::lanes;
    const float *from = op.sums + oc * pitch + c;
    Isa::V m[P], half[H::R * W::n], w[taps];
#pragma GCC unroll 64
    for (int p = 0; p < P; ++p)
      m[p] = Isa::load(from + p * op.sums_apart);
    for (int32_t chunk = 1; chunk < op.chunks; ++chunk) {
      from += P * op.sums_apart;
#pragma GCC unroll 64
      for (int p = 0; p < P; ++p)
        m[p] += Isa::load(from + p * op.sums_apart);
    }
#pragma GCC unroll 8
    for (int j = 0; j < W::n; ++j)
      interpolate<H, W::n>(m + j, half + j);
#pragma GCC unroll 8
    for (int i = 0; i < H::R; ++i)
      interpolate<W, 1>(half + i * W::n, w + i * W::R);
#pragma GCC unroll 25
    for (int tap = 0; tap < taps; ++tap)
      write_some(of.dw + (oc * taps + tap) * of.c + c, w[tap], static_cast<int>(of.c - c));
  }
}

struct MultiplyPoints {
  const GradientTilesOp &op;
  const Worker &worker;

  template <int Rows, class> void operator()() const {
    int64_t pitch = int64_t(op.vectors) * Isa::lanes;
    auto panel = [&](int64_t p, int64_t vector, int64_t together, int64_t low, int64_t high) {
      const float *columns = op.x + p * op.x_apart + vector / 2 * op.depth * WIDE;
      for (int64_t tile = low; tile < high; ++tile) {
        int64_t row = tile * Rows;
        Place to{op.sums + p * op.sums_apart + row * pitch + vector * Isa::lanes, pitch,
                 static_cast<int>(lesser_of(op.of.oc - row, Rows)), static_cast<int>(together) * Isa::lanes,
                 op.begin == op.first};
        auto product = together == 2 ? tile_product<false, Rows, 2> : tile_product<false, Rows, 1>;
        product(op.grad + p * op.grad_apart + tile * op.depth * Rows, columns, Steps{op.of.steps, op.end - op.begin},
                to);
      }
    };
    share_panels(op.points, op.vectors, tiles_of(op.of), worker, panel);
  }
};

void transform_tiles(const GradientTilesOp &op, const Worker &worker) {
  with_axes(op.of, [&](auto h, auto w) {
    if (op.of.type == Type::bfloat16)
      GradientTiles<decltype(h), decltype(w), bf16>::transform(op, worker);
    else
      GradientTiles<decltype(h), decltype(w), float>::transform(op, worker);
  });
}

void multiply_points(const GradientTilesOp &op, const Worker &worker) {
  with_rows<Isa::rows>(op.of, MultiplyPoints{op, worker});
}

void finish_taps(const GradientTilesOp &op, const Worker &worker) {
  with_axes(op.of, [&](auto h, auto w) { finish_tiles<decltype(h), decltype(w)>(op, worker); });
}

} // namespace
} // namespace inception_fast::cpu
