// What the fused pair refuses, and why, and the rest of its C interface that needs neither GPU nor driver.
#include "errors.h"
#include "pair_plan.h"

namespace inception_fast::hopper {

namespace {

void multiple(Reasons &reasons, const char *name, int64_t value, int64_t of, int64_t most) {
  reasons.require(value > 0 && value % of == 0 && value <= most, std::string(name) + " " + std::to_string(value),
                  "multiples of " + std::to_string(of) + " up to " + std::to_string(most));
}

void pitch(Reasons &reasons, const char *name, int64_t value, int64_t channels) {
  reasons.require(value % 8 == 0 && value >= channels && value <= 1 << 24,
                  std::string(name) + " " + std::to_string(value),
                  "multiples of 8 from its " + std::to_string(channels) + " channels to 2^24");
}

} // namespace

std::vector<std::string> pair_reasons(const HopperPair &pair, int type, int config) {
  const std::vector<HopperPairConfig> configs = pair_configs();
  Reasons reasons;
  reasons.between("type", type, HOPPER_BFLOAT16, HOPPER_FLOAT16);
  reasons.between("config", config, 0, static_cast<int64_t>(configs.size()) - 1);
  if (!reasons.list.empty())
    return reasons.list;
  const HopperPairConfig &chosen = configs[config];
  const std::string map = "a map of " + std::to_string(pair.h) + "x" + std::to_string(pair.w);
  if (pair.h == 8 && pair.w == 8)
    reasons.require(false, map,
                    "17x17; at 8x8 two convolutions are the better form, since a tile of theirs spans several images");
  else
    reasons.require(pair.h == SIDE && pair.w == SIDE, map, "17x17");
  reasons.between("n", pair.n, 1, INT32_MAX / PIXELS);
  reasons.between("taps", pair.taps, PAIR_TAPS, PAIR_TAPS);
  multiple(reasons, "c", pair.c, 8, 1 << 20);
  multiple(reasons, "mid", pair.mid, PAIR_DEPTH, chosen.middle);
  multiple(reasons, "oc", pair.oc, 16, 64 * chosen.groups);
  reasons.between("wide_first", pair.wide_first, 0, 1);
  reasons.between("relu1", pair.relu1, 0, 1);
  reasons.between("relu2", pair.relu2, 0, 1);
  pitch(reasons, "pitch of x", pair.x_pitch, pair.c);
  pitch(reasons, "pitch of y", pair.y_pitch, pair.oc);
  reasons.address("x", pair.x);
  reasons.address("y", pair.y);
  reasons.address("w1", pair.w1);
  reasons.address("w2", pair.w2);
  reasons.address("scale1", pair.scale1);
  reasons.address("shift1", pair.shift1);
  reasons.address("scale2", pair.scale2);
  reasons.address("shift2", pair.shift2);
  return reasons.list;
}

} // namespace inception_fast::hopper

using namespace inception_fast::hopper;

extern "C" {

int32_t hopper_pair_configs(HopperPairConfig *configs, int32_t capacity) {
  return guarded(-1, [&] { return copied(pair_configs(), configs, capacity); });
}

int32_t hopper_pair_reasons(const HopperPair *pair, int32_t type, int32_t config, char *text, int64_t capacity) {
  return guarded(-1, [&] { return written(pair_reasons(*pair, type, config), text, capacity); });
}
}
