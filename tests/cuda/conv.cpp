// The convolution of kernels/cuda on the emulated device, prepared by its own host arithmetic.
#include "../../kernels/cuda/conv.cuh"
#include "../../kernels/cuda/conv_plan.h"
#include "../../kernels/cuda/halo.cuh"
#include "../../kernels/cuda/pooled.cuh"
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

template <int N, int PARTS, int WARPGROUPS, class T> int run_pooled(const Group &group, int blocks, int shared) {
  return emulated::launch_grid(blocks, WARPGROUP * (1 + WARPGROUPS), group.cluster, shared,
                               [&] { pooled<N, PARTS, WARPGROUPS, T>(group); });
}

using Run = int (*)(const Group &, int, int);

// The widths that the tests use: one and several parts of 64 columns, whole and not. A kernel with a mistake is
// compiled in few forms, by one type.
#if defined(ONLY_48) || defined(ONLY_TWOS) || defined(ONLY_BEHIND) || defined(ONLY_POOLED)
constexpr int ONLY_TYPE = HOPPER_BFLOAT16;
#else
constexpr int ONLY_TYPE = -1;
#endif

template <class T> Run run_of_halo(const HopperConfig &config) {
  switch (config.turns * 1000000 + config.rows * 1000 + config.columns) {
#if !defined(ONLY_TWOS) && !defined(ONLY_BEHIND) && !defined(ONLY_POOLED)
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
#endif
  default:
    return nullptr;
  }
}

template <class T> Run run_of_pooled(const HopperConfig &config) {
#if !defined(ONLY_48) && !defined(ONLY_TWOS) && !defined(ONLY_BEHIND)
  switch (config.rows * 1000 + config.columns) {
  case 256064:
    return run_pooled<64, 2, 2, T>;
  case 256096:
    return run_pooled<96, 2, 2, T>;
#ifndef ONLY_POOLED
  case 512064:
    return run_pooled<64, 4, 2, T>;
  case 128192:
    return run_pooled<192, 1, 2, T>;
#endif
  }
#endif
  return nullptr;
}

template <class T> Run run_of(const HopperConfig &config) {
  if (config.pooled)
    return run_of_pooled<T>(config);
  if (is_halo(config.turns))
    return run_of_halo<T>(config);
  switch (way_of(config) * 1000 + config.columns) {
#if !defined(ONLY_TWOS) && !defined(ONLY_BEHIND) && !defined(ONLY_POOLED)
  case HALVES * 1000 + 48:
    return run<48, HALVES, T>;
  case TURNS * 1000 + 48:
    return run<48, TURNS, T>;
#ifndef ONLY_48
  case HALVES * 1000 + 32:
    return run<32, HALVES, T>;
  case TURNS * 1000 + 32:
    return run<32, TURNS, T>;
  case HALVES * 1000 + 80:
    return run<80, HALVES, T>;
  case TURNS * 1000 + 80:
    return run<80, TURNS, T>;
  case HALVES * 1000 + 192:
    return run<192, HALVES, T>;
  case TURNS * 1000 + 192:
    return run<192, TURNS, T>;
  case BEHIND * 1000 + 192:
    return run<192, BEHIND, T>;
#endif
#endif
#if !defined(ONLY_48) && !defined(ONLY_BEHIND) && !defined(ONLY_POOLED)
  case TWOS * 1000 + 96:
    return run<96, TWOS, T>;
#endif
#if !defined(ONLY_48) && !defined(ONLY_TWOS) && !defined(ONLY_POOLED)
  case BEHIND * 1000 + 96:
    return run<96, BEHIND, T>;
#endif
  default:
    return nullptr;
  }
}

Run run_of(const HopperConfig &config, int type) {
  if constexpr (ONLY_TYPE == HOPPER_BFLOAT16)
    return type == ONLY_TYPE ? run_of<__nv_bfloat16>(config) : nullptr;
  else
    return type == HOPPER_BFLOAT16 ? run_of<__nv_bfloat16>(config) : run_of<__half>(config);
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
    std::vector<const MapSpec *> maps{&group.x[i], &group.weights[i]};
    if (chosen.behind && convs[i].residual) {
      group.residual[i] = residual_map(convs[i], element);
      maps.push_back(&group.residual[i]);
    }
    for (const MapSpec *map : maps)
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
  const Run run = run_of(chosen, type);
  if (!run)
    return complain("tiles of " + std::to_string(chosen.columns) + " columns are not compiled for the emulator");
  return run(group, conv_blocks(group.problem, units, chosen, blocks), chosen.shared_bytes);
}
