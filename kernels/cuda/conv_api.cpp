// The part of the C interface that is arithmetic and needs neither GPU nor driver.
#include <stdexcept>

#include "conv_plan.h"
#include "errors.h"

using namespace inception_fast::hopper;

namespace {

HopperConfig config_at(int32_t config) {
  const std::vector<HopperConfig> configs = conv_configs();
  if (config < 0 || config >= static_cast<int32_t>(configs.size()))
    throw std::invalid_argument("config " + std::to_string(config) + "; allowed: 0 to " +
                                std::to_string(configs.size() - 1));
  return configs[config];
}

void check_group(const HopperConv *convs, int32_t count, int32_t config) {
  const std::vector<std::string> reasons = conv_reasons(convs, count, HOPPER_BFLOAT16, config);
  if (!reasons.empty())
    throw std::invalid_argument(reasons.front());
}

} // namespace

extern "C" {

int32_t hopper_abi(void) { return HOPPER_ABI; }

const char *hopper_error(void) { return last_error().c_str(); }

int32_t hopper_conv_configs(HopperConfig *configs, int32_t capacity) {
  return guarded(-1, [&] { return copied(conv_configs(), configs, capacity); });
}

int32_t hopper_conv_reasons(const HopperConv *convs, int32_t count, int32_t type, int32_t config, char *text,
                            int64_t capacity) {
  return guarded(-1, [&] { return written(conv_reasons(convs, count, type, config), text, capacity); });
}

int64_t hopper_conv_units(const HopperConv *convs, int32_t count, int32_t config) {
  return guarded(int64_t{-1}, [&] {
    check_group(convs, count, config);
    Problem problems[MAX_PROBLEMS];
    return fill_problems(convs, count, config_at(config), 0, problems);
  });
}

int64_t hopper_conv_workspace_bytes(const HopperConv *convs, int32_t count, int32_t config) {
  return guarded(int64_t{-1}, [&] {
    check_group(convs, count, config);
    return workspace_of(convs, count, config_at(config)).bytes;
  });
}

int64_t hopper_conv_counter_bytes(const HopperConv *convs, int32_t count, int32_t config) {
  return guarded(int64_t{-1}, [&] {
    check_group(convs, count, config);
    return workspace_of(convs, count, config_at(config)).counter_bytes;
  });
}
}
