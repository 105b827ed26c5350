// What the convolution refuses, and why: each reason has the value seen and the value allowed.
#include "conv_plan.h"

namespace inception_fast::hopper {

namespace {

// Limits of an im2col map of rank 4: corners are signed bytes, a tap's place an unsigned one, strides at most 8.
constexpr int64_t MIN_CORNER = -128, MAX_CORNER = 127, MAX_TAP = 255, MAX_STEP = 8;
constexpr int64_t MAX_STRIDE = int64_t{1} << 40, MAX_PIXELS = (int64_t{1} << 31) - 1024;
constexpr int64_t MAX_PITCH = int64_t{1} << 31; // of elements: 32 bits of bytes

void multiple(Reasons &reasons, const char *name, int64_t value, int64_t of) {
  reasons.require(value > 0 && value % of == 0, std::string(name) + " " + std::to_string(value),
                  "positive multiples of " + std::to_string(of));
}

void pitch(Reasons &reasons, const char *name, int64_t value, int64_t channels) {
  multiple(reasons, name, value, 8);
  reasons.require(value >= channels, std::string(name) + " " + std::to_string(value),
                  "at least its " + std::to_string(channels) + " channels");
  reasons.require(value < MAX_PITCH, std::string(name) + " " + std::to_string(value), "less than 2^31");
}

void check_sizes(Reasons &reasons, const HopperConv &conv) {
  const int64_t most = INT32_MAX;
  reasons.between("n", conv.n, 1, most);
  reasons.between("h", conv.h, 1, most);
  reasons.between("w", conv.w, 1, most);
  multiple(reasons, "c", conv.c, 8);
  multiple(reasons, "oc", conv.oc, 8);
  reasons.between("kh", conv.kh, 1, MAX_TAP + 1);
  reasons.between("kw", conv.kw, 1, MAX_TAP + 1);
  reasons.between("stride_h", conv.stride_h, 1, MAX_STEP);
  reasons.between("stride_w", conv.stride_w, 1, MAX_STEP);
  reasons.between("oh", conv.oh, 1, most);
  reasons.between("ow", conv.ow, 1, most);
  reasons.between("top", conv.top, 0, -MIN_CORNER);
  reasons.between("left", conv.left, 0, -MIN_CORNER);
}

void check_map(Reasons &reasons, const HopperConv &conv, const HopperConfig &config) {
  const int64_t bottom = int64_t{conv.oh - 1} * conv.stride_h + 1 - conv.top - conv.h;
  const int64_t right = int64_t{conv.ow - 1} * conv.stride_w + 1 - conv.left - conv.w;
  reasons.between("last row of windows, from the map's end,", bottom, MIN_CORNER, MAX_CORNER);
  reasons.between("last column of windows, from the map's end,", right, MIN_CORNER, MAX_CORNER);
  reasons.between("pixels of y", int64_t{conv.n} * conv.oh * conv.ow, 1, MAX_PIXELS);
  const double image = 2.0 * static_cast<double>(conv.x_pitch) * conv.h * conv.w;
  reasons.require(image < static_cast<double>(MAX_STRIDE), "an image of x of " + std::to_string(image) + " bytes",
                  "less than 2^40");
  reasons.between("splits", conv.splits, 1, std::min<int64_t>(iterations_of(conv, config), MAX_SPLITS));
}

void check_twos(Reasons &reasons, const HopperConv &conv, const HopperConfig &config) {
  if (!is_halo(config.turns) && way_of(config) == TWOS)
    reasons.require(conv.residual == 0, "a residual of tiles of 128 pixels in turn", "none");
}

void check_behind(Reasons &reasons, const HopperConv &conv, const HopperConfig &config) {
  if (config.behind)
    reasons.between("splits of tiles that are stored behind", conv.splits, 1, 1);
}

void check_halo(Reasons &reasons, const HopperConv &conv) {
  reasons.require(
      conv.stride_h == 1 && conv.stride_w == 1,
      "strides " + std::to_string(conv.stride_h) + " and " + std::to_string(conv.stride_w) + " of halo tiles", "1");
  reasons.between("splits of halo tiles", conv.splits, 1, 1);
  reasons.between("pixels of a padded row of halo tiles", int64_t{conv.ow} + conv.kw - 1, 1, HALO_PITCH - 1);
  const int64_t rows = int64_t{conv.n} * (int64_t{conv.oh} + conv.kh - 1);
  reasons.between("pixels of padded maps of halo tiles", rows * HALO_PITCH, 1, MAX_PIXELS);
}

void check_pooled(Reasons &reasons, const HopperConv &conv, const HopperConfig &config, int count) {
  if (!config.pooled) {
    reasons.between("pooled rows of tiles that are not pooled", conv.pooled_h, 0, 0);
    reasons.between("pooled columns of tiles that are not pooled", conv.pooled_w, 0, 0);
    return;
  }
  reasons.between("pooled rows", conv.pooled_h, 1, (int64_t{conv.oh} + 1) / 2);
  reasons.between("pooled columns", conv.pooled_w, 1, (int64_t{conv.ow} + 1) / 2);
  reasons.between("convolutions of a launch that is pooled", count, 1, 1);
  reasons.require(conv.residual == 0, "a residual of a convolution that is pooled", "none");
}

void check_fit(Reasons &reasons, const HopperConv &conv, const HopperConfig &config) {
  const HaloSizes sizes = halo_sizes(problem_of(conv, config), config);
  reasons.require(sizes.stages >= 2, std::to_string(sizes.x_bytes) + " bytes of rows of a halo tile",
                  "as many as leave room for two stages of weights");
}

void check_memory(Reasons &reasons, const HopperConv &conv) {
  reasons.address("x", conv.x);
  reasons.address("weights", conv.weights);
  reasons.address("scale", conv.scale);
  reasons.address("shift", conv.shift);
  pitch(reasons, "pitch of x", conv.x_pitch, conv.c);
  if (conv.residual) {
    reasons.address("residual", conv.residual);
    pitch(reasons, "pitch of residual", conv.residual_pitch, conv.oc);
  }
  reasons.between("outputs", conv.outputs, 1, MAX_OUTPUTS);
  if (conv.outputs < 1 || conv.outputs > MAX_OUTPUTS)
    return;
  int64_t columns = 0;
  for (int i = 0; i < conv.outputs; ++i) {
    const HopperOutput &output = conv.output[i];
    reasons.address("an output", output.y);
    multiple(reasons, "channels of an output", output.channels, 8);
    pitch(reasons, "pitch of an output", output.pitch, output.channels);
    reasons.between("relu of an output", output.relu, 0, 1);
    columns += output.channels;
  }
  reasons.require(columns == conv.oc, "outputs of " + std::to_string(columns) + " channels in all",
                  "as many as oc, " + std::to_string(conv.oc));
}

} // namespace

std::vector<std::string> conv_reasons(const HopperConv *convs, int count, int type, int config) {
  const std::vector<HopperConfig> configs = conv_configs();
  Reasons reasons;
  reasons.between("type", type, HOPPER_BFLOAT16, HOPPER_FLOAT16);
  reasons.between("config", config, 0, static_cast<int64_t>(configs.size()) - 1);
  reasons.between("convolutions of a group", count, 1, MAX_PROBLEMS);
  if (!reasons.list.empty())
    return reasons.list;
  double units = 0;
  for (int i = 0; i < count; ++i) {
    if (count > 1)
      reasons.where = "convolution " + std::to_string(i) + ": ";
    const size_t before = reasons.list.size();
    check_sizes(reasons, convs[i]);
    check_memory(reasons, convs[i]);
    if (reasons.list.size() > before)
      continue; // what follows computes with these
    check_map(reasons, convs[i], configs[config]);
    check_twos(reasons, convs[i], configs[config]);
    check_behind(reasons, convs[i], configs[config]);
    check_pooled(reasons, convs[i], configs[config], count);
    if (is_halo(configs[config].turns)) {
      check_halo(reasons, convs[i]);
      if (reasons.list.size() == before)
        check_fit(reasons, convs[i], configs[config]);
    }
    if (reasons.list.size() == before) {
      const Problem problem = problem_of(convs[i], configs[config]);
      units += static_cast<double>(problem.row_units) * problem.column_tiles * problem.splits;
    }
  }
  reasons.where.clear();
  reasons.require(units < INT32_MAX / 2, std::to_string(units) + " units", "fewer than 2^30");
  return reasons.list;
}

} // namespace inception_fast::hopper
