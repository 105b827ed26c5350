// From a group of convolutions, as the C interface states it, to what the kernel is given: arithmetic without a GPU.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "api.h"
#include "conv_sizes.h"
#include "halo_schedule.h"
#include "plan.h"
#include "pooled_schedule.h"
#include "schedule.h"
#include "tensor_map.h"

namespace inception_fast::hopper {

static_assert(MAX_PROBLEMS == HOPPER_GROUP && MAX_OUTPUTS == HOPPER_OUTPUTS, "the interface and the kernel agree");

// Every configuration, in the order of its index.
inline std::vector<HopperConfig> conv_configs() {
  std::vector<HopperConfig> configs;
  const auto add = [&](int columns, int way) {
    for (int depth : {64, 32})
      for (int cluster : {1, 2}) {
        const int stages = ring_stages(way, columns, depth);
        configs.push_back({tile_rows(way), columns, depth, stages, cluster, way == TURNS || way == TWOS, way == BEHIND,
                           0, ALIGNMENT + shared_bytes(way, columns, depth, stages)});
      }
  };
  for (int columns : TILE_COLUMNS)
    for (int way : {HALVES, TURNS})
      add(columns, way);
  for (int columns : TWOS_COLUMNS)
    add(columns, TWOS);
  for (int columns : BEHIND_COLUMNS)
    add(columns, BEHIND);
  const auto add_halo = [&](const HaloTile &tile, int pooled) {
    for (int depth : {64, 32})
      configs.push_back(
          {halo_positions(tile), tile.columns, depth, HALO_STAGES, 1, tile.warpgroups, 0, pooled, SHARED_LIMIT});
  };
  for (const HaloTile &tile : HALO_TILES)
    add_halo(tile, 0);
  for (const HaloTile &tile : POOLED_TILES)
    add_halo(tile, 1);
  return configs;
}

// What a halo tile needs of shared memory: bytes of a stage of x, how many stages of weights fit beside two, and rows
// of results where these are pooled.
struct HaloSizes {
  int64_t x_bytes;
  int stages, ring;
};

// What is left of shared memory beside two stages of x.
inline int64_t left_of_halo(int64_t x_bytes, const HopperConfig &config) {
  const int more =
      config.pooled ? pooled_bytes(config.columns, config.turns) : halo_bytes(config.columns, config.turns);
  return SHARED_LIMIT - ALIGNMENT - HALO_STAGES * x_bytes - more;
}

inline HaloSizes halo_sizes(const Problem &problem, const HopperConfig &config) {
  const int64_t row = int64_t{2} * config.depth * problem.pitch;
  const int64_t positions = int64_t{problem.pitch} - 1 + config.rows + problem.last_tap;
  const int64_t bytes = (ceil_div(positions, problem.pitch) * row + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  const int64_t results = int64_t{2} * config.columns * problem.pitch;
  const int least = config.pooled ? least_ring(problem, config.rows) : 0;
  const int64_t left = left_of_halo(bytes, config) - least * results;
  const int64_t stages = left < 0 ? 0 : left / stage_bytes(0, config.columns, config.depth);
  return {bytes, static_cast<int>(std::min<int64_t>(stages, MAX_STAGES)), least};
}

// How the warpgroups of tiles that are no halo tiles share them.
inline int way_of(const HopperConfig &config) { return way_of(config.rows, config.turns, config.behind); }

// Of a block: one warpgroup fills the ring, the others multiply.
inline int threads_of(const HopperConfig &config) {
  return WARPGROUP * (1 + (is_halo(config.turns) ? config.turns : consumers(way_of(config))));
}

inline int64_t iterations_of(const HopperConv &conv, const HopperConfig &config) {
  return static_cast<int64_t>(conv.kh) * conv.kw * ceil_div(conv.c, config.depth);
}

// The kernel's view of one convolution; `first_unit` and the workspace are the group's to fill in.
inline Problem problem_of(const HopperConv &conv, const HopperConfig &config) {
  Problem problem{};
  problem.image_pixels = conv.oh * conv.ow;
  problem.pixels = conv.n * problem.image_pixels;
  problem.ow = conv.ow;
  problem.stride_h = conv.stride_h;
  problem.stride_w = conv.stride_w;
  problem.top = conv.top;
  problem.left = conv.left;
  problem.oc = conv.oc;
  problem.kw = conv.kw;
  problem.taps = conv.kh * conv.kw;
  problem.chunks = ceil_div(conv.c, config.depth);
  problem.last_steps = ceil_div(conv.c - (problem.chunks - 1) * config.depth, K_STEP);
  if (is_halo(config.turns)) {
    const int pixels = 64 / config.depth; // of 128 bytes, on which a copy's target begins
    problem.pitch = ceil_div(conv.ow + conv.kw - 1, pixels) * pixels;
    problem.image_rows = conv.oh + conv.kh - 1;
    problem.oh = conv.oh;
    problem.last_tap = (conv.kh - 1) * problem.pitch + conv.kw - 1;
    problem.pooled_h = conv.pooled_h;
    problem.pooled_w = conv.pooled_w;
    const int last = ((conv.n - 1) * problem.image_rows + conv.oh - 1) * problem.pitch + conv.ow - 1;
    problem.row_tiles = ceil_div(last + 1, config.rows);
  } else {
    problem.row_tiles = ceil_div(problem.pixels, config.rows);
  }
  problem.row_units = ceil_div(problem.row_tiles, config.cluster);
  problem.column_tiles = ceil_div(conv.oc, config.columns);
  problem.splits = conv.splits;
  const int64_t parts = std::max(conv.splits, 1); // units are counted of convolutions that nobody has checked, too
  problem.part_steps = static_cast<int32_t>(iterations_of(conv, config) / parts);
  problem.part_rest = static_cast<int32_t>(iterations_of(conv, config) % parts);
  problem.units = problem.row_units * problem.column_tiles * problem.splits;
  problem.scale = conv.scale;
  problem.shift = conv.shift;
  problem.residual = conv.residual;
  problem.residual_pitch = conv.residual_pitch;
  problem.residual_scale = conv.residual_scale;
  problem.outputs = conv.outputs;
  int end = 0;
  for (int i = 0; i < conv.outputs; ++i) {
    end += conv.output[i].channels;
    problem.output[i] = {conv.output[i].y, conv.output[i].pitch, end, conv.output[i].relu};
  }
  return problem;
}

inline MapSpec x_map(const HopperConv &conv, Element element, const HopperConfig &config) {
  MapSpec map;
  map.base = conv.x;
  map.rank = 4;
  map.im2col = !is_halo(config.turns);
  map.element = element;
  map.swizzle = config.depth == 64 ? Swizzle::bytes128 : Swizzle::bytes64;
  const uint64_t size[4] = {static_cast<uint64_t>(conv.c), static_cast<uint64_t>(conv.w), static_cast<uint64_t>(conv.h),
                            static_cast<uint64_t>(conv.n)};
  uint64_t stride = 2 * static_cast<uint64_t>(conv.x_pitch);
  for (int i = 0; i < 4; ++i) {
    map.size[i] = size[i];
    if (i < 3)
      map.stride[i] = stride;
    stride *= i < 2 ? size[i + 1] : 1;
  }
  if (is_halo(config.turns)) { // a row at a time, and beyond its ends as far as the padding goes
    const uint32_t box[4] = {static_cast<uint32_t>(config.depth), static_cast<uint32_t>(problem_of(conv, config).pitch),
                             1, 1};
    std::copy_n(box, 4, map.box);
    return map;
  }
  map.step[1] = conv.stride_w;
  map.step[2] = conv.stride_h;
  // Corners of the windows run from the padding before the map to the last window's, whatever padding is behind it.
  map.lower[0] = -conv.left;
  map.lower[1] = -conv.top;
  map.upper[0] = (conv.ow - 1) * conv.stride_w + 1 - conv.left - conv.w;
  map.upper[1] = (conv.oh - 1) * conv.stride_h + 1 - conv.top - conv.h;
  map.channels = config.depth;
  map.pixels = config.rows;
  return map;
}

// Of all problems of a group together.
inline HaloSizes halo_sizes(const Problem *problems, int count, const HopperConfig &config) {
  HaloSizes most = halo_sizes(problems[0], config);
  for (int i = 1; i < count; ++i) {
    const HaloSizes one = halo_sizes(problems[i], config);
    most = one.x_bytes > most.x_bytes ? one : most;
  }
  return most;
}

inline MapSpec weight_map(const HopperConv &conv, Element element, const HopperConfig &config) {
  return weights_map(conv.weights, static_cast<int64_t>(conv.kh) * conv.kw, conv.oc, conv.c, element, config.depth,
                     config.columns / config.cluster);
}

// The residual, of which a warpgroup's part of a tile takes boxes of 64 pixels by 64 columns, swizzled as its results
// are.
inline MapSpec residual_map(const HopperConv &conv, Element element) {
  MapSpec map;
  map.base = conv.residual;
  map.rank = 2;
  map.element = element;
  map.swizzle = Swizzle::bytes128;
  map.size[0] = conv.oc;
  map.size[1] = static_cast<uint64_t>(conv.n) * conv.oh * conv.ow;
  map.stride[0] = 2 * static_cast<uint64_t>(conv.residual_pitch);
  map.box[0] = STAGED_COLUMNS;
  map.box[1] = 64;
  return map;
}

// What the group needs beside its tensors, and where in it each problem's share begins.
struct Workspace {
  int64_t counter_bytes = 0, bytes = 0;
  int64_t counter[MAX_PROBLEMS] = {}, partial[MAX_PROBLEMS] = {};
};

inline Workspace workspace_of(const HopperConv *convs, int count, const HopperConfig &config) {
  Workspace workspace;
  int64_t tiles[MAX_PROBLEMS] = {};
  for (int i = 0; i < count; ++i)
    if (convs[i].splits > 1) {
      const Problem problem = problem_of(convs[i], config);
      tiles[i] = static_cast<int64_t>(problem.row_tiles) * problem.column_tiles;
      workspace.counter[i] = workspace.counter_bytes;
      workspace.counter_bytes += 8 * tiles[i];
    }
  workspace.bytes = workspace.counter_bytes = (workspace.counter_bytes + 255) / 256 * 256;
  for (int i = 0; i < count; ++i)
    if (tiles[i]) {
      workspace.partial[i] = workspace.bytes;
      workspace.bytes += 4 * tiles[i] * convs[i].splits * config.rows * config.columns;
    }
  return workspace;
}

// Numbers the units of a group through and gives each problem its workspace; returns how many units there are.
inline int64_t fill_problems(const HopperConv *convs, int count, const HopperConfig &config, uint64_t workspace,
                             Problem *problems) {
  const Workspace parts = workspace_of(convs, count, config);
  int64_t units = 0;
  for (int i = 0; i < count; ++i) {
    problems[i] = problem_of(convs[i], config);
    problems[i].first_unit = static_cast<int32_t>(units);
    problems[i].counter = workspace + parts.counter[i];
    problems[i].partial = workspace + parts.partial[i];
    units += problems[i].units;
  }
  return units;
}

// What the kernel of a configuration is told beside tensor maps and problems. GROUP is the kernel's Group.
template <class GROUP> void fill_group(GROUP &group, int count, int64_t units, const HopperConfig &config) {
  const bool halo = is_halo(config.turns);
  const HaloSizes sizes = halo ? halo_sizes(group.problem, count, config) : HaloSizes{0, config.stages, 0};
  group.units = static_cast<int32_t>(units);
  group.cluster = config.cluster;
  group.stages = sizes.stages;
  group.depth = config.depth;
  group.x_bytes = static_cast<int32_t>(sizes.x_bytes);
  group.ring = sizes.ring;
  group.stay = halo && config.columns <= STAYING_COLUMNS && weights_stay(group.problem, count, sizes.stages);
}

// Blocks of a launch: at most `most`, but as many as one cluster or one band of every column of tiles needs.
inline int conv_blocks(const Problem *problems, int64_t units, const HopperConfig &config, int most) {
  if (!config.pooled)
    return grid_blocks(units, config.cluster, most);
  const int columns = problems[0].column_tiles, lines = problems[0].pixels / problems[0].image_pixels;
  return std::min(lines * problems[0].pooled_h, std::max(most / columns, 1)) * columns;
}

std::vector<std::string> conv_reasons(const HopperConv *convs, int count, int type, int config);

} // namespace inception_fast::hopper
