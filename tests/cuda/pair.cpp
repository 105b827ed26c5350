// The fused pair on the emulated device: the kernel's own source and plan, without the CUDA runtime between them.
#include "../../kernels/cuda/pair.cuh"
#include "../../kernels/cuda/pair_plan.h"
#include "machine.h"

using namespace inception_fast;
using namespace inception_fast::hopper;

namespace {

template <int TAPS, int GROUPS> void run(const PairGroup &group, int type) {
  if (type == HOPPER_BFLOAT16)
    hopper::pair<TAPS, GROUPS, __nv_bfloat16>(group);
  else
    hopper::pair<TAPS, GROUPS, __half>(group);
}

template <int GROUPS> void run_taps(const PairGroup &group, int type, int taps) {
  taps == 3 ? run<3, GROUPS>(group, type) : taps == 5 ? run<5, GROUPS>(group, type) : run<7, GROUPS>(group, type);
}

int refuse(const char *why) {
  emulated::machine().error = why;
  return 2;
}

} // namespace

extern "C" int emulated_pair(const HopperPair *pair, int type, int config, int blocks) {
  const HopperPairConfig chosen = pair_configs()[config];
  const Element element = type == HOPPER_BFLOAT16 ? Element::bfloat16 : Element::float16;
  PairGroup group{};
  group.x = pair_x_map(*pair, element);
  group.w1 = pair_weight_map(pair->w1, pair->taps, pair->mid, pair->c, element, chosen);
  group.w2 = pair_weight_map(pair->w2, pair->taps, pair->oc, pair->mid, element, chosen);
  for (const MapSpec *map : {&group.x, &group.w1, &group.w2})
    if (const char *why = emulated::check_map(*map))
      return refuse(why);
  fill_pair(group, *pair, chosen);
  const unsigned grid = unsigned(pair_blocks(*pair, chosen, blocks ? blocks : emulated::multiprocessors()));
  return emulated::launch_grid(
      grid, unsigned(pair_threads(chosen.groups)), unsigned(chosen.cluster), uint32_t(chosen.shared_bytes),
      [&] { chosen.groups == 3 ? run_taps<3>(group, type, pair->taps) : run_taps<4>(group, type, pair->taps); });
}
