// From a fused pair, as the C interface states it, to what the kernel is given: arithmetic without a GPU.
#pragma once

#include <string>
#include <vector>

#include "api.h"
#include "pair_api.h"
#include "pair_schedule.h"
#include "plan.h"
#include "tensor_map.h"

namespace inception_fast::hopper {

constexpr int PAIR_TAPS = 7; // of the kernels that are built

// Every configuration, in the order of its index.
inline std::vector<HopperPairConfig> pair_configs() {
  std::vector<HopperPairConfig> configs;
  for (int groups : {3, 4})
    for (int cluster : {1, 2})
      configs.push_back({groups, cluster, middle_channels(groups), 1024 + pair_shared_bytes(groups)});
  return configs;
}

// Planes of 8 channels, 16 bytes a pixel; the axis of the first convolution is the slow one, with a row of zeros at
// either end of the box, from outside of the tensor.
inline MapSpec pair_x_map(const HopperPair &pair, Element element) {
  MapSpec map;
  map.base = pair.x;
  map.rank = 5;
  map.element = element;
  const uint64_t pixel = 2 * static_cast<uint64_t>(pair.x_pitch), row = SIDE * pixel;
  const uint64_t size[5] = {8, SIDE, SIDE, static_cast<uint64_t>(pair.c / 8), static_cast<uint64_t>(pair.n)};
  const uint64_t stride[4] = {pair.wide_first ? row : pixel, pair.wide_first ? pixel : row, 16, SIDE * row};
  const uint32_t box[5] = {8, SIDE, SIDE + 2, PAIR_PLANES, 1};
  for (int i = 0; i < 5; ++i) {
    map.size[i] = size[i];
    map.box[i] = box[i];
    if (i < 4)
      map.stride[i] = stride[i];
  }
  return map;
}

// [taps][oc][c]: the rows of all warpgroups, those past oc zero, or the half of them that a block of a cluster loads.
inline MapSpec pair_weight_map(uint64_t weights, int taps, int oc, int c, Element element,
                               const HopperPairConfig &config) {
  return weights_map(weights, taps, oc, c, element, PAIR_DEPTH, 64 * config.groups / config.cluster);
}

// Everything that is not a tensor map. GROUP is the kernel's PairGroup.
template <class GROUP> void fill_pair(GROUP &group, const HopperPair &pair, const HopperPairConfig &config) {
  group.scale1 = pair.scale1;
  group.shift1 = pair.shift1;
  group.scale2 = pair.scale2;
  group.shift2 = pair.shift2;
  group.y = pair.y;
  group.pitch = pair.y_pitch;
  group.n = pair.n;
  group.c = pair.c;
  group.mid = pair.mid;
  group.oc = pair.oc;
  group.slow = pair.wide_first ? SIDE : 1; // the second convolution's axis is h behind 1 x taps
  group.fast = pair.wide_first ? 1 : SIDE;
  group.relu1 = pair.relu1;
  group.relu2 = pair.relu2;
  group.cluster = config.cluster;
}

// Blocks of a launch, an image each.
inline int pair_blocks(const HopperPair &pair, const HopperPairConfig &config, int most) {
  return grid_blocks(ceil_div(pair.n, config.cluster), config.cluster, most);
}

std::vector<std::string> pair_reasons(const HopperPair &pair, int type, int config);

} // namespace inception_fast::hopper
