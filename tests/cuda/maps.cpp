// The index arithmetic of the convolution's kernel, for a test that does the rest in NumPy. Needs no emulated device.
#include <cstdint>
#include <vector>

#include "../../kernels/cuda/conv_plan.h"

using namespace inception_fast::hopper;

// (problem, row, column, split, first, last, n, h, w) of each unit's tile in each block of the cluster; returns the
// units, and writes those that fit.
extern "C" int64_t maps_tiles(const HopperConv *convs, int32_t count, int32_t config, int32_t *rows, int64_t capacity) {
  const HopperConfig chosen = conv_configs()[config];
  Problem problems[MAX_PROBLEMS];
  const int64_t units = fill_problems(convs, count, chosen, 0, problems);
  for (int64_t i = 0; i < units * chosen.cluster && i < capacity; ++i) {
    const int unit = static_cast<int>(i / chosen.cluster), rank = static_cast<int>(i % chosen.cluster);
    const Tile tile = tile_of(problems, unit, chosen.cluster, rank);
    const Corner corner = corner_of(problems[tile.problem], tile.row, chosen.rows);
    for (const int value :
         {tile.problem, tile.row, tile.column, tile.split, tile.first, tile.last, corner.n, corner.h, corner.w})
      *rows++ = value;
  }
  return units;
}

// (tap, chunk, steps) of iterations [first, last).
extern "C" void maps_steps(const HopperConv *conv, int32_t config, int32_t first, int32_t last, int32_t *rows) {
  const HopperConfig chosen = conv_configs()[config];
  const Problem problem = problem_of(*conv, chosen);
  Step step = step_of(problem, first);
  for (int i = first; i < last; ++i, advance(problem, step)) {
    *rows++ = step.tap;
    *rows++ = step.chunk;
    *rows++ = step.chunk + 1 == problem.chunks ? problem.last_steps : chosen.depth / K_STEP;
  }
}

// What the tensor maps say: sizes, strides (bytes), box, element strides, corners, channels, pixels.
extern "C" void maps_of(const HopperConv *conv, int32_t config, int64_t *x, int64_t *weights) {
  const HopperConfig chosen = conv_configs()[config];
  const MapSpec maps[] = {x_map(*conv, Element::bfloat16, chosen), weight_map(*conv, Element::bfloat16, chosen)};
  int64_t *to[] = {x, weights};
  for (int m = 0; m < 2; ++m) {
    const MapSpec &map = maps[m];
    int64_t *row = to[m];
    for (int i = 0; i < 4; ++i) {
      row[i] = static_cast<int64_t>(map.size[i]);
      row[4 + i] = static_cast<int64_t>(map.stride[i]);
      row[8 + i] = map.box[i];
      row[12 + i] = map.step[i];
    }
    row[16] = map.lower[0];
    row[17] = map.lower[1];
    row[18] = map.upper[0];
    row[19] = map.upper[1];
    row[20] = map.channels;
    row[21] = map.pixels;
  }
}

// Addresses of elements (pixel, column), and of its ReLU flag's output.
extern "C" void maps_addresses(const HopperConv *conv, int32_t config, int64_t count, const int32_t *pixels,
                               const int32_t *columns, uint64_t *addresses, int32_t *outputs) {
  const Problem problem = problem_of(*conv, conv_configs()[config]);
  for (int64_t i = 0; i < count; ++i) {
    outputs[i] = output_of(problem, columns[i]);
    addresses[i] = element_address(problem, outputs[i], pixels[i], columns[i]);
  }
}

// The stage and parity after `counts` iterations were used or skipped in turn.
extern "C" void maps_ring(int32_t stages, int32_t count, const int32_t *counts, int32_t *rows) {
  Place place{0, 0}, walked{0, 0};
  for (int i = 0; i < count; ++i) {
    skip(place, stages, counts[i]);
    for (int j = 0; j < counts[i]; ++j)
      advance(walked, stages);
    for (const int value : {place.stage, static_cast<int>(place.parity), walked.stage, static_cast<int>(walked.parity)})
      *rows++ = value;
  }
}

// (first row, rows, offset) of each halo tile, the pixel of y of each of its positions, and what the host makes of it
// all: pitch, rows of an image, bytes of a stage of x, stages of weights. Returns the tiles; null writes nothing.
extern "C" int32_t maps_halo(const HopperConv *conv, int32_t config, int32_t *tiles, int32_t *pixels, int32_t *sizes) {
  const HopperConfig chosen = conv_configs()[config];
  const Problem problem = problem_of(*conv, chosen);
  for (int tile = 0; tiles && tile < problem.row_tiles; ++tile) {
    const Rows rows = rows_of(problem, tile, chosen.rows);
    for (const int value : {rows.first, rows.count, rows.offset})
      *tiles++ = value;
    for (int i = 0; i < chosen.rows; i += 16) // as a warp asks
      for (int r = 0; r < 16; ++r)
        *pixels++ = pixel_of(problem, behind(problem, position_at(problem, tile * chosen.rows + i), r));
  }
  if (sizes) {
    const HaloSizes needed = halo_sizes(problem, chosen);
    for (const int value : {problem.pitch, problem.image_rows, static_cast<int>(needed.x_bytes), needed.stages})
      *sizes++ = value;
  }
  return problem.row_tiles;
}

// (column of tiles, first row, lines, tiles) of a block's band, and (image, row of the pooled map, first and last row
// of the padded maps) of each of its lines; returns the blocks of a launch with `bands` for each column of tiles.
extern "C" int32_t maps_band(const HopperConv *conv, int32_t config, int32_t bands, int32_t block, int32_t *band,
                             int32_t *lines) {
  const HopperConfig chosen = conv_configs()[config];
  const Problem problem = problem_of(*conv, chosen);
  const Band found = band_of(problem, block, bands, chosen.rows);
  for (const int value : {found.column, found.line.row, found.lines, found.tiles})
    *band++ = value;
  Line line = found.line;
  for (int i = 0; lines && i < found.lines; ++i, line = next_line(problem, line))
    for (const int value : {line.image, line.h, line.row, line.last})
      *lines++ = value;
  return bands * problem.column_tiles;
}

// Pitch, rows of an image and of the ring, positions of a row up to the last that is pooled.
extern "C" void maps_pooled(const HopperConv *conv, int32_t config, int32_t *sizes) {
  const HopperConfig chosen = conv_configs()[config];
  const Problem problem = problem_of(*conv, chosen);
  for (const int value : {problem.pitch, problem.image_rows, halo_sizes(problem, chosen).ring, line_end(problem)})
    *sizes++ = value;
}

// Whether a tile may be stored where the next line begins at `row` of the band's, and `made` tiles are stored.
extern "C" int32_t maps_may_store(const HopperConv *conv, int32_t config, int32_t tile, int32_t row, int32_t made) {
  const HopperConfig chosen = conv_configs()[config];
  const Problem problem = problem_of(*conv, chosen);
  const Line line{0, 0, row, row};
  const int free = free_position(problem, Band{}, line, chosen.rows, made);
  return may_store(problem, tile, chosen.rows, free, halo_sizes(problem, chosen).ring);
}

// Where the ring has the 16 bytes of 8 columns.
extern "C" int32_t maps_result_place(int32_t columns, int32_t position, int32_t group) {
  return columns == 64   ? result_place<64>(position, group)
         : columns == 96 ? result_place<96>(position, group)
                         : result_place<192>(position, group);
}
