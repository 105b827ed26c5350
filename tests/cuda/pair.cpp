// The fused pair on the emulated device: the kernel's own source and plan, without the CUDA runtime between them.
#include "../../kernels/cuda/pair.cuh"
#include "../../kernels/cuda/pair_plan.h"
#include "machine.h"

using namespace inception_fast;
using namespace inception_fast::hopper;

namespace {

// The instances that tests run: with ONE_INSTANCE, for spoilt sources, a single one.
using Kernel = void (*)(PairGroup);

Kernel kernel_of(int taps, int groups, int type) {
#ifndef ONE_INSTANCE
  const bool wide = groups == 4, half = type == HOPPER_FLOAT16;
  if (taps == 3)
    return half ? nullptr : wide ? nullptr : &hopper::pair<3, 3, __nv_bfloat16>;
  if (taps == 5)
    return !half ? nullptr : wide ? &hopper::pair<5, 4, __half> : nullptr;
  if (taps == 7 && (half || wide))
    return half ? (wide ? nullptr : &hopper::pair<7, 3, __half>) : &hopper::pair<7, 4, __nv_bfloat16>;
#endif
  return taps == 7 && groups == 3 && type == HOPPER_BFLOAT16 ? &hopper::pair<7, 3, __nv_bfloat16> : nullptr;
}

int refuse(const char *why) {
  emulated::machine().error = why;
  return 2;
}

} // namespace

extern "C" int emulated_pair(const HopperPair *pair, int type, int config, int blocks) {
  const HopperPairConfig chosen = pair_configs()[config];
  const Element element = element_named(type);
  PairGroup group{};
  group.x = pair_x_map(*pair, element);
  group.w1 = pair_weight_map(pair->w1, pair->taps, pair->mid, pair->c, element, chosen);
  group.w2 = pair_weight_map(pair->w2, pair->taps, pair->oc, pair->mid, element, chosen);
  for (const MapSpec *map : {&group.x, &group.w1, &group.w2})
    if (const char *why = emulated::check_map(*map))
      return refuse(why);
  for (const uint64_t address : {pair->x, pair->y})
    emulated::earlier_grid_uses(reinterpret_cast<const void *>(address));
  fill_pair(group, *pair, chosen);
  const unsigned grid = unsigned(pair_blocks(*pair, chosen, blocks ? blocks : emulated::multiprocessors()));
  const Kernel kernel = kernel_of(pair->taps, chosen.groups, type);
  if (!kernel)
    return refuse("this instance is not among those that the tests build");
  return emulated::launch_grid(grid, unsigned(pair_threads(chosen.groups)), unsigned(chosen.cluster),
                               uint32_t(chosen.shared_bytes), [&] { kernel(group); });
}
