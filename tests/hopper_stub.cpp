// The C interface of the Hopper kernels over host memory, by plain loops: what the Python side hands over is computed
// as `api.h` says, so that a wrong field, address or order shows as a wrong number. `stub_*` tell the tests what was
// launched.
#include "hopper_stub.h"
#include "pair_api.h"

using namespace stub;

namespace {

const HopperConfig configs[] = {{128, 64, 64, 4, 1, 0, 0, 0, 98304},
                                {128, 128, 64, 4, 1, 0, 0, 0, 131072},
                                {256, 96, 64, 3, 2, 1, 0, 0, 135168},
                                {256, 64, 32, 2, 1, 2, 0, 1, 196608}};
const int config_count = sizeof configs / sizeof *configs;

struct Blob {
  int32_t count, type, config, overlap;
  uint64_t workspace;
  HopperConv convs[HOPPER_GROUP];
};

struct PairBlob {
  int32_t type, config, overlap;
  HopperPair pair;
};

// One of a pair's convolutions, 1 x taps or taps x 1.
HopperConv part(const HopperPair &pair, bool wide, uint64_t x, uint64_t weights, uint64_t scale, uint64_t shift,
                int64_t x_pitch, int32_t c, HopperOutput to) {
  HopperConv conv{};
  conv.x = x, conv.weights = weights, conv.scale = scale, conv.shift = shift, conv.x_pitch = x_pitch;
  conv.n = pair.n, conv.h = conv.oh = pair.h, conv.w = conv.ow = pair.w, conv.c = c, conv.oc = to.channels;
  conv.kh = wide ? 1 : pair.taps, conv.kw = wide ? pair.taps : 1, conv.stride_h = conv.stride_w = 1;
  conv.top = conv.kh / 2, conv.left = conv.kw / 2, conv.residual_scale = 1, conv.splits = conv.outputs = 1;
  conv.output[0] = to;
  return conv;
}

int64_t tiles(const HopperConv &conv, const HopperConfig &config) {
  return (pixels(conv) + config.rows - 1) / config.rows * ((conv.oc + config.columns - 1) / config.columns);
}

} // namespace

extern "C" {

int32_t hopper_abi(void) { return HOPPER_ABI; }
int32_t hopper_devices(void) { return 1; }
const char *hopper_error(void) { return error.c_str(); }

int32_t hopper_conv_configs(HopperConfig *to, int32_t capacity) {
  for (int32_t i = 0; i < config_count && i < capacity; ++i)
    to[i] = configs[i];
  return config_count;
}

int32_t hopper_conv_reasons(const HopperConv *convs, int32_t count, int32_t type, int32_t config, char *text,
                            int64_t capacity) {
  std::string all;
  int32_t found = 0;
  complain(all, found, type != HOPPER_BFLOAT16 && type != HOPPER_FLOAT16, "type " + std::to_string(type));
  complain(all, found, count < 1 || count > HOPPER_GROUP, "count " + std::to_string(count) + "; allowed: 1 to 8");
  for (int32_t i = 0; i < count && i < HOPPER_GROUP; ++i) {
    const HopperConv &conv = convs[i];
    complain_of(conv, all, found);
    complain(all, found, configs[config].columns == 96 && conv.oc % 96, "oc is no multiple of 96");
    complain(all, found, configs[config].pooled != (conv.pooled_h > 0), "pooled rows, or none");
    complain(all, found, configs[config].pooled && (count > 1 || conv.residual), "a group or a residual, pooled");
  }
  return told(all, found, text, capacity);
}

int64_t hopper_conv_units(const HopperConv *convs, int32_t count, int32_t config) {
  int64_t units = 0;
  for (int32_t i = 0; i < count; ++i)
    units += tiles(convs[i], configs[config]) * convs[i].splits;
  return units;
}

int64_t hopper_conv_counter_bytes(const HopperConv *convs, int32_t count, int32_t config) {
  int64_t counters = 0;
  for (int32_t i = 0; i < count; ++i)
    counters += convs[i].splits > 1 ? tiles(convs[i], configs[config]) : 0;
  return (counters * 4 + 127) / 128 * 128;
}

int64_t hopper_conv_workspace_bytes(const HopperConv *convs, int32_t count, int32_t config) {
  int64_t parts = 0;
  for (int32_t i = 0; i < count; ++i)
    parts += convs[i].splits > 1 ? 4 * pixels(convs[i]) * convs[i].oc * convs[i].splits : 0;
  return hopper_conv_counter_bytes(convs, count, config) + parts;
}

int64_t hopper_conv_blob_bytes(void) { return sizeof(Blob); }

int32_t hopper_conv_prepare(const HopperConv *convs, int32_t count, int32_t type, int32_t config, uint64_t workspace,
                            int32_t, int32_t overlap, void *blob) {
  char text[1024];
  if (hopper_conv_reasons(convs, count, type, config, text, sizeof text))
    return fail(text);
  if (hopper_conv_workspace_bytes(convs, count, config) && (!workspace || workspace % 128))
    return fail("a workspace is needed, on 128 bytes");
  Blob made{count, type, config, overlap, workspace, {}};
  std::memcpy(made.convs, convs, sizeof(HopperConv) * count);
  std::memcpy(blob, &made, sizeof made);
  return 0;
}

int32_t hopper_conv_launch(const void *blob, uint64_t stream) {
  Blob made;
  std::memcpy(&made, blob, sizeof made);
  if (stream)
    return fail("a stream on a machine without a GPU");
  const int64_t counters = hopper_conv_counter_bytes(made.convs, made.count, made.config);
  for (int64_t i = 0; i < counters; ++i)
    if (reinterpret_cast<const char *>(made.workspace)[i])
      return fail("a counter of the workspace is not zero");
  float *parts = reinterpret_cast<float *>(made.workspace + counters);
  int32_t splits = 1;
  for (int32_t i = 0; i < made.count; ++i) {
    const HopperConv &conv = made.convs[i];
    splits = conv.splits > splits ? conv.splits : splits;
    parts = compute(conv, made.type, parts);
  }
  launched.push_back({made.count, made.config, made.overlap, splits});
  return 0;
}

int32_t hopper_pair_configs(HopperPairConfig *to, int32_t capacity) {
  const HopperPairConfig all[] = {{3, 1, 192, 1}, {4, 2, 256, 1}};
  for (int32_t i = 0; i < 2 && i < capacity; ++i)
    to[i] = all[i];
  return 2;
}

int32_t hopper_pair_reasons(const HopperPair *pair, int32_t, int32_t config, char *text, int64_t capacity) {
  std::string all;
  int32_t found = 0;
  complain(all, found, pair->c % 8 || pair->mid % 4 || pair->oc % 8, "channels");
  complain(all, found, pair->mid > (config ? 256 : 192), "mid " + std::to_string(pair->mid));
  complain(all, found, pair->x % 16 || pair->y % 16 || pair->x_pitch % 8 || pair->y_pitch % 8, "addresses");
  std::strncpy(text, all.c_str(), capacity);
  return found;
}

int64_t hopper_pair_blob_bytes(void) { return sizeof(PairBlob); }

int32_t hopper_pair_prepare(const HopperPair *pair, int32_t type, int32_t config, int32_t, int32_t overlap,
                            void *blob) {
  const PairBlob made{type, config, overlap, *pair};
  std::memcpy(blob, &made, sizeof made);
  return 0;
}

int32_t hopper_pair_launch(const void *blob, uint64_t stream) {
  PairBlob made;
  std::memcpy(&made, blob, sizeof made);
  if (stream)
    return fail("a stream on a machine without a GPU");
  const HopperPair &p = made.pair;
  std::vector<uint16_t> middle(size_t(p.n) * p.h * p.w * p.mid);
  const uint64_t between = reinterpret_cast<uint64_t>(middle.data());
  for (const HopperConv &conv :
       {part(p, p.wide_first, p.x, p.w1, p.scale1, p.shift1, p.x_pitch, p.c, {between, p.mid, p.mid, p.relu1}),
        part(p, !p.wide_first, between, p.w2, p.scale2, p.shift2, p.mid, p.mid, {p.y, p.y_pitch, p.oc, p.relu2})})
    for (int64_t pixel = 0; pixel < pixels(conv); ++pixel)
      for (int32_t column = 0; column < conv.oc; ++column)
        finish(conv, made.type, pixel, column, sum(conv, made.type, pixel, column, 0));
  launched.push_back({2, -1 - made.config, made.overlap, 1});
  return 0;
}

// (count, config, overlap, splits) of each launch since the last call, up to `capacity`; returns how many there were.
int32_t stub_launched(int32_t *values, int32_t capacity) {
  const int32_t count = int32_t(launched.size());
  for (int32_t i = 0; i < count && i < capacity; ++i)
    std::memcpy(values + 4 * i, &launched[i], sizeof launched[i]);
  launched.clear();
  return count;
}

// sizeof and the offsets of all fields, in the order of the headers: of the structures of api.h, then of pair_api.h.
int32_t stub_layout(int64_t *values, int32_t capacity) {
#define AT(type, field) int64_t(offsetof(type, field))
  const int64_t all[] = {sizeof(HopperOutput),
                         AT(HopperOutput, y),
                         AT(HopperOutput, pitch),
                         AT(HopperOutput, channels),
                         AT(HopperOutput, relu),
                         sizeof(HopperConv),
                         AT(HopperConv, x),
                         AT(HopperConv, weights),
                         AT(HopperConv, scale),
                         AT(HopperConv, shift),
                         AT(HopperConv, residual),
                         AT(HopperConv, x_pitch),
                         AT(HopperConv, residual_pitch),
                         AT(HopperConv, n),
                         AT(HopperConv, h),
                         AT(HopperConv, w),
                         AT(HopperConv, c),
                         AT(HopperConv, oc),
                         AT(HopperConv, kh),
                         AT(HopperConv, kw),
                         AT(HopperConv, stride_h),
                         AT(HopperConv, stride_w),
                         AT(HopperConv, top),
                         AT(HopperConv, left),
                         AT(HopperConv, oh),
                         AT(HopperConv, ow),
                         AT(HopperConv, pooled_h),
                         AT(HopperConv, pooled_w),
                         AT(HopperConv, residual_scale),
                         AT(HopperConv, splits),
                         AT(HopperConv, outputs),
                         AT(HopperConv, output),
                         sizeof(HopperConfig),
                         AT(HopperConfig, rows),
                         AT(HopperConfig, columns),
                         AT(HopperConfig, depth),
                         AT(HopperConfig, stages),
                         AT(HopperConfig, cluster),
                         AT(HopperConfig, turns),
                         AT(HopperConfig, behind),
                         AT(HopperConfig, pooled),
                         AT(HopperConfig, shared_bytes),
                         sizeof(HopperPair),
                         AT(HopperPair, x),
                         AT(HopperPair, y),
                         AT(HopperPair, w1),
                         AT(HopperPair, scale1),
                         AT(HopperPair, shift1),
                         AT(HopperPair, w2),
                         AT(HopperPair, scale2),
                         AT(HopperPair, shift2),
                         AT(HopperPair, x_pitch),
                         AT(HopperPair, y_pitch),
                         AT(HopperPair, n),
                         AT(HopperPair, h),
                         AT(HopperPair, w),
                         AT(HopperPair, c),
                         AT(HopperPair, mid),
                         AT(HopperPair, oc),
                         AT(HopperPair, taps),
                         AT(HopperPair, wide_first),
                         AT(HopperPair, relu1),
                         AT(HopperPair, relu2),
                         sizeof(HopperPairConfig),
                         AT(HopperPairConfig, groups),
                         AT(HopperPairConfig, cluster),
                         AT(HopperPairConfig, middle),
                         AT(HopperPairConfig, shared_bytes)};
#undef AT
  const int32_t count = sizeof all / sizeof *all;
  std::memcpy(values, all, sizeof(int64_t) * (count < capacity ? count : capacity));
  return count;
}

} // extern "C"
