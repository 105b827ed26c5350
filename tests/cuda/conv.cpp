// The convolution of kernels/cuda on the emulated device, prepared by its own host arithmetic.
#include "../../kernels/cuda/conv.cuh"
#include "../../kernels/cuda/conv_plan.h"
#include "../../kernels/cuda/halo.cuh"
#include "machine.h"

using namespace inception_fast;
using namespace inception_fast::hopper;

namespace {

template <int N, int WAY, class T> int run(const Group &group, int blocks, int shared) {
  return emulated::launch_grid(blocks, conv_threads(WAY), group.cluster, shared, [&] { conv<N, WAY, T>(group); });
}

template <int N, int PARTS, int WARPGROUPS, class T> int run_halo(const Group &group, int blocks, int shared) {
  return emulated::launch_grid(blocks, WARPGROUP * (1 + WARPGROUPS), group.cluster, shared,
                               [&] { halo<N, PARTS, WARPGROUPS, T>(group); });
}

using Run = int (*)(const Group &, int, int);

// The widths that the tests use: one and several parts of 64 columns, whole and not.
template <class T> Run run_of(const HopperConfig &config) {
  if (is_halo(config.turns))
    switch (config.turns * 1000000 + config.rows * 1000 + config.columns) {
    case 2512048:
      return run_halo<48, 4, 2, T>;
    case 4512048:
      return run_halo<48, 2, 4, T>;
#ifndef ONLY_48
    case 2512032:
      return run_halo<32, 4, 2, T>;
    case 2128192:
      return run_halo<192, 1, 2, T>;
    case 4512032:
      return run_halo<32, 2, 4, T>;
    case 3192128:
      return run_halo<128, 1, 3, T>;
#endif
    default:
      return nullptr;
    }
#ifndef ONLY_48
  if (way_of(config.rows, config.turns) == TWOS)
    return config.columns == 96 ? run<96, TWOS, T> : nullptr;
#endif
#ifdef ONLY_TWOS
  return nullptr;
#else
  switch (config.columns) {
  case 48:
    return config.turns ? run<48, TURNS, T> : run<48, HALVES, T>;
#ifndef ONLY_48
  case 32:
    return config.turns ? run<32, TURNS, T> : run<32, HALVES, T>;
  case 80:
    return config.turns ? run<80, TURNS, T> : run<80, HALVES, T>;
  case 192:
    return config.turns ? run<192, TURNS, T> : run<192, HALVES, T>;
#endif
  default:
    return nullptr;
  }
#endif
}

int complain(const std::string &text) {
  emulated::machine().error = text;
  return 2;
}

} // namespace

extern "C" int emulated_conv(const HopperConv *convs, int32_t count, int32_t type, int32_t config, uint64_t workspace,
                             int32_t blocks) {
  const std::vector<std::string> reasons = conv_reasons(convs, count, type, config);
  if (!reasons.empty())
    return complain(reasons.front());
  const HopperConfig chosen = conv_configs()[config];
  const Element element = element_named(type);
  Group group{};
  for (int i = 0; i < count; ++i) {
    group.x[i] = x_map(convs[i], element, chosen);
    group.weights[i] = weight_map(convs[i], element, chosen);
    for (const MapSpec *map : {&group.x[i], &group.weights[i]})
      if (const char *why = emulated::check_map(*map))
        return complain(why);
  }
  const int64_t units = fill_problems(convs, count, chosen, workspace, group.problem);
  for (int i = 0; i < count; ++i) {
    for (const uint64_t address : {convs[i].x, convs[i].residual, workspace})
      emulated::earlier_grid_uses(reinterpret_cast<const void *>(address));
    for (int j = 0; j < convs[i].outputs; ++j)
      emulated::earlier_grid_uses(reinterpret_cast<const void *>(convs[i].output[j].y));
  }
  fill_group(group, count, units, chosen);
  const Run run = type == HOPPER_BFLOAT16 ? run_of<__nv_bfloat16>(chosen) : run_of<__half>(chosen);
  if (!run)
    return complain("tiles of " + std::to_string(chosen.columns) + " columns are not compiled for the emulator");
  return run(group, grid_blocks(units, chosen.cluster, blocks), chosen.shared_bytes);
}
