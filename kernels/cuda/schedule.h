// Which tile of which convolution a block computes, and which pixels, channels and taps that is. Plain arithmetic that
// the kernel, its host side and the tests share.
//
// A convolution is a product of matrices: a row is an output pixel (n, oh, ow), a column an output channel, and K runs
// over taps and, inside a tap, over the channels in chunks of `depth`. Work comes in units: one column of tiles, as
// many tiles below each other as the cluster has blocks, and one part of K. Units of all convolutions of a group are
// numbered through, and cluster i takes units i, i + clusters, ...
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace inception_fast::hopper {

constexpr int MAX_PROBLEMS = 8; // HOPPER_GROUP
constexpr int MAX_OUTPUTS = 8;  // HOPPER_OUTPUTS
constexpr int K_STEP = 16;      // channels of one wgmma
constexpr int MAX_SPLITS = 65535;

// Columns from the previous output's `end` to this one's.
struct Output {
  uint64_t y; // address of its first channel
  int64_t pitch;
  int32_t end;
  int32_t relu;
};

struct Problem {
  int32_t first_unit, units;
  int32_t pixels, image_pixels, ow; // n * oh * ow, oh * ow
  int32_t stride_h, stride_w, top, left;
  int32_t oc, kw, taps;
  int32_t chunks, last_steps;    // chunks of a tap; steps of K_STEP in the last of them
  int32_t row_tiles, row_units;  // tiles down the rows, and units of them
  int32_t column_tiles, splits;  // tiles along the columns; parts of K, at most MAX_SPLITS
  int32_t part_steps, part_rest; // steps of K over parts, and what is left of them
  int32_t outputs;               // used entries of `output`
  int32_t pitch, image_rows;     // of the padded map that halo tiles walk: its pixels a row, its rows an image
  int32_t oh, last_tap;          // rows of an image of y; positions that the last tap is behind the first
  int32_t pooled_h, pooled_w;    // where y is pooled, its rows an image and its pixels a row
  float residual_scale;
  uint64_t scale, shift, residual; // residual is 0 when there is none
  int64_t residual_pitch;
  uint64_t partial, counter; // of split K: float [tile][split][rows * columns], uint32 [tile][2]
  Output output[MAX_OUTPUTS];
};

struct Tile {
  int problem;
  int row, column; // of tiles; a row past the last has nothing to store
  int split;
  int first, last; // iterations of K
};

// Where the window of a pixel begins on the map, padding counted in, and its image.
struct Corner {
  int n, h, w;
};

// One step of the ring through K.
struct Step {
  int tap, chunk;
};

HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The convolution that a unit belongs to.
HOST_DEVICE int problem_at(const Problem *problems, int unit) {
  int index = 0;
  while (unit >= problems[index].first_unit + problems[index].units)
    ++index;
  return index;
}

// Where a part of K begins: steps * split / splits, without 64 bits.
HOST_DEVICE int part_begin(const Problem &problem, int split) {
  const uint32_t rest = static_cast<uint32_t>(problem.part_rest) * static_cast<uint32_t>(split);
  return problem.part_steps * split + static_cast<int>(rest / static_cast<uint32_t>(problem.splits));
}

// Tile of block `rank` of a cluster of `cluster` blocks in this unit. A division takes a hundred cycles, in which a new
// block has nothing else to do: where the answer is known, none is made.
HOST_DEVICE Tile tile_of(const Problem *problems, int unit, int cluster, int rank) {
  const int index = problem_at(problems, unit);
  const Problem &problem = problems[index];
  int rest = unit - problem.first_unit;
  Tile tile{index, 0, 0, 0, 0, problem.part_steps};
  if (problem.splits > 1) {
    tile.split = rest % problem.splits;
    rest /= problem.splits;
    tile.first = part_begin(problem, tile.split);
    tile.last = part_begin(problem, tile.split + 1);
  }
  if (problem.column_tiles > 1) {
    tile.column = rest % problem.column_tiles;
    rest /= problem.column_tiles;
  }
  tile.row = rest * cluster + rank;
  return tile;
}

HOST_DEVICE Step step_of(const Problem &problem, int iteration) {
  if (iteration == 0)
    return {0, 0};
  return {iteration / problem.chunks, iteration % problem.chunks};
}

HOST_DEVICE void advance(const Problem &problem, Step &step) {
  if (++step.chunk == problem.chunks) {
    step.chunk = 0;
    ++step.tap;
  }
}

// Of the tile's first pixel. A tile past the last stands in for the last, so that every load stays inside the tensor.
HOST_DEVICE Corner corner_of(const Problem &problem, int row_tile, int rows) {
  const int tile = row_tile < problem.row_tiles ? row_tile : problem.row_tiles - 1;
  const int pixel = tile * rows, rest = pixel % problem.image_pixels;
  return {pixel / problem.image_pixels, rest / problem.ow * problem.stride_h - problem.top,
          rest % problem.ow * problem.stride_w - problem.left};
}

// The output that a column goes to; columns of a tile past `oc` go nowhere and must not be asked for.
HOST_DEVICE int output_of(const Problem &problem, int column) {
  int index = 0;
  while (column >= problem.output[index].end)
    ++index;
  return index;
}

// Address of y's element (pixel, column).
HOST_DEVICE uint64_t element_address(const Problem &problem, int output, int pixel, int column) {
  const Output &to = problem.output[output];
  const int begin = output == 0 ? 0 : problem.output[output - 1].end;
  return to.y + 2 * static_cast<uint64_t>(pixel * to.pitch + (column - begin));
}

// A place in the ring of stages: the stage, and the parity of the barrier's phase there.
struct Place {
  int stage;
  uint32_t parity;
};

HOST_DEVICE void advance(Place &place, int stages) {
  if (++place.stage == stages) {
    place.stage = 0;
    place.parity ^= 1;
  }
}

HOST_DEVICE void skip(Place &place, int stages, int count) {
  const int stage = place.stage + count;
  place.parity ^= (stage / stages) & 1;
  place.stage = stage % stages;
}

} // namespace inception_fast::hopper
