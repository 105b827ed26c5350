#include "build.h"

#include "winograd_pack.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace inception_fast::cpu {

namespace {

// Work below these is done before a second thread is awake.
constexpr int64_t SERIAL_MACS = 200'000;
constexpr int64_t SERIAL_FLOATS = 10'000;
constexpr int64_t WEIGHT_LIMIT = std::numeric_limits<int32_t>::max();
constexpr double MOST_ELEMENTS = 0x1p60; // of a buffer: its bytes are counted in 63 bits

std::string numbers(const std::vector<int64_t> &values) {
  std::string out = "(";
  for (int64_t value : values)
    out += (out.size() > 1 ? ", " : "") + std::to_string(value);
  return out + ")";
}

int32_t out_size(int32_t size, int32_t kernel, int32_t stride, int64_t padding) {
  return static_cast<int32_t>((size + padding - kernel) / stride + 1);
}

int64_t weight_count(const ConvOp &op) { return int64_t(op.oc) * (op.c / op.groups) * op.kh * op.kw; }

} // namespace

Builder::Builder(const Tier &tier, int64_t arena_bytes) : plan_(new Plan) {
  plan_->tier_ = &tier;
  plan_->arena_bytes_ = arena_bytes;
  expect(arena_bytes >= 0, "arena of " + std::to_string(arena_bytes) + " bytes", "0 or more");
}

void Builder::refuse(const std::string &seen, const std::string &allowed) const {
  std::string where = plan_->names_.empty() ? "plan" : "step '" + plan_->names_.back() + "'";
  throw std::invalid_argument(where + ": " + seen + "; allowed: " + allowed);
}

void Builder::expect(bool condition, const std::string &seen, const std::string &allowed) const {
  if (!condition)
    refuse(seen, allowed);
}

void Builder::input(Shape s) {
  expect(s.n >= 0 && s.c >= 1 && s.h >= 1 && s.w >= 1, "input shape " + numbers({s.n, s.c, s.h, s.w}),
         "n >= 0, c h w >= 1");
  plan_->inputs_.push_back(s);
}

void Builder::buffer(Buffer b) {
  std::string name = "buffer " + std::to_string(plan_->buffers_.size());
  expect(b.n >= 0 && b.h >= 1 && b.w >= 1 && b.c >= 1, name + " of shape " + numbers({b.n, b.h, b.w, b.c}),
         "n >= 0, h w c >= 1");
  expect(double(b.n) * b.h * b.w * b.c < MOST_ELEMENTS, name + " of shape " + numbers({b.n, b.h, b.w, b.c}),
         "fewer than 2^60 elements");
  std::string place = name + " at " + std::to_string(b.position);
  if (b.kind == BufferKind::arena) {
    expect(b.position >= 0 && b.position % 64 == 0, place, "a multiple of 64 bytes");
    expect(b.position <= plan_->arena_bytes_ - b.bytes(), place + " of " + std::to_string(b.bytes()) + " bytes",
           "inside the arena of " + std::to_string(plan_->arena_bytes_) + " bytes");
  } else if (b.kind == BufferKind::local) {
    expect(b.position >= 0, place, "0 or more");
  } else if (b.kind == BufferKind::input) {
    int64_t count = static_cast<int64_t>(plan_->inputs_.size());
    expect(b.position >= 0 && b.position < count, place, "one of " + std::to_string(count) + " inputs");
    const Shape &s = plan_->inputs_[b.position];
    expect(s.n == b.n && s.h == b.h && s.w == b.w && s.c == b.c, name + " of shape " + numbers({b.n, b.h, b.w, b.c}),
           "that of its input, " + numbers({s.n, s.h, s.w, s.c}));
  } else {
    for (const Buffer &other : plan_->buffers_)
      expect(other.kind != BufferKind::output || other.position != b.position, place + " among the outputs",
             "a position of its own");
  }
  plan_->buffers_.push_back(b);
}

void Builder::step(std::string name, int32_t images) {
  plan_->names_.push_back(std::move(name));
  expect(images >= 0, std::to_string(images) + " images at a time", "0 or more");
  images_ = images;
}

View Builder::view(const ViewSpec &v, const std::string &role) const {
  int64_t count = static_cast<int64_t>(plan_->buffers_.size());
  expect(v.buffer >= 0 && v.buffer < count, role + " in buffer " + std::to_string(v.buffer),
         "one of " + std::to_string(count) + " buffers");
  int32_t c = plan_->buffers_[v.buffer].c;
  View out{v.buffer, v.offset, v.channels, c, plan_->buffers_[v.buffer].type};
  expect(plan_->buffers_[v.buffer].kind != BufferKind::local || role == "intermediate",
         role + " in buffer " + std::to_string(v.buffer) + " of kind local", "arena, input, output");
  expect(v.offset >= 0 && v.channels >= 1 && v.channels <= c - v.offset, role + " " + text(out),
         "at least one of its channels [0, " + std::to_string(c) + ")");
  return out;
}

void Builder::expect_map(const View &v, const std::string &role, int32_t n, int32_t h, int32_t w, int32_t c) const {
  const Buffer &b = plan_->buffers_[v.buffer];
  expect(images_of(v) == n && b.h == h && b.w == w && v.channels == c,
         role + " of shape " + numbers({images_of(v), b.h, b.w, v.channels}), numbers({n, h, w, c}));
}

// How many of the view's images the step at hand takes at a time.
int32_t Builder::images_of(const View &v) const {
  int32_t n = plan_->buffers_[v.buffer].n;
  expect(images_ == 0 || n % images_ == 0,
         "buffer " + std::to_string(v.buffer) + " of " + std::to_string(n) + " images",
         "a multiple of the " + std::to_string(images_) + " that the step takes at a time");
  return images_ == 0 ? n : images_;
}

int64_t Builder::pixels_of(const View &v) const {
  const Buffer &b = plan_->buffers_[v.buffer];
  return int64_t(images_of(v)) * b.h * b.w;
}

void Builder::expect_same_map(const View &x, const View &y) const {
  const Buffer &b = plan_->buffers_[x.buffer];
  expect_map(y, "output", images_of(x), b.h, b.w, x.channels);
}

const float *Builder::constant(Vector values, int32_t channels, const std::string &role) {
  if (values.data == nullptr)
    return nullptr;
  expect(values.length == channels, role + " of length " + std::to_string(values.length), std::to_string(channels));
  plan_->constants_.emplace_back(new float[channels]);
  float *copy = plan_->constants_.back().get();
  std::copy_n(values.data, channels, copy);
  return copy;
}

void Builder::add(Op op, const std::vector<View> &reads, const std::vector<View> &writes, bool in_place, int64_t work) {
  expect(!plan_->names_.empty(), "an operator outside a step", "operators after step()");
  std::string where = "step '" + plan_->names_.back() + "'";
  for (size_t i = 0; i < writes.size(); ++i) {
    for (size_t j = 0; j < i; ++j)
      expect(!overlap(plan_->buffers_, writes[i], writes[j]), "outputs " + text(writes[j]) + " and " + text(writes[i]),
             "outputs that do not overlap");
    for (size_t j = 0; j < reads.size(); ++j) {
      const View &x = reads[j], &y = writes[i];
      // A pixel's value may replace the one it was made of: element by element, or a residual's.
      bool same = x.buffer == y.buffer && x.offset == y.offset && x.channels == y.channels;
      expect(!overlap(plan_->buffers_, x, y) || (same && (in_place || j > 0)),
             "output " + text(y) + " over operand " + text(x), "memory that the step does not read");
    }
  }
  op.step = plan_->steps() - 1;
  bool macs = std::holds_alternative<ConvOp>(op.kernel) || std::holds_alternative<PairOp>(op.kernel);
  op.serial = work <= (macs ? SERIAL_MACS : SERIAL_FLOATS);
  accesses_.push_back({reads, writes, images_, op.serial, where});
  plan_->ops_.push_back(std::move(op));
}

void Builder::expect_conv(const ConvSpec &s, const ConvArrays &arrays) const {
  expect(std::min({s.h, s.w, s.c, s.oc, s.kh, s.kw, s.stride[0], s.stride[1], s.groups}) >= 1,
         "sizes " + numbers({s.h, s.w, s.c, s.oc, s.kh, s.kw, s.stride[0], s.stride[1], s.groups}), "1 or more");
  expect(*std::min_element(s.padding.begin(), s.padding.end()) >= 0, "negative padding", "0 or more");
  expect(s.c % s.groups == 0 && s.oc % s.groups == 0, std::to_string(s.groups) + " groups", "a divisor of c and oc");
  expect(int64_t(s.h) + s.padding[0] + s.padding[1] >= s.kh && int64_t(s.w) + s.padding[2] + s.padding[3] >= s.kw,
         "kernel " + numbers({s.kh, s.kw}), "not larger than the padded map");
  expect_weights(s, arrays.weights);
  for (const auto &[values, role] : {std::pair(arrays.scale, "scale"), std::pair(arrays.shift, "shift")})
    expect(values.length == s.oc, std::string(role) + " of length " + std::to_string(values.length),
           std::to_string(s.oc));
}

void Builder::expect_weights(const ConvSpec &s, const std::vector<WeightArray> &weights) const {
  std::vector<int64_t> shape{s.oc, s.c / s.groups, s.kh, s.kw};
  std::string seen = weights.size() == 1 ? "weight of shape " : "weights of shapes ";
  int64_t columns = 0;
  bool fit = true;
  for (const WeightArray &each : weights) {
    seen += (&each == weights.data() ? "" : ", ") + numbers(each.shape);
    fit = fit && each.shape.size() == 4 && std::equal(shape.begin() + 1, shape.end(), each.shape.begin() + 1);
    columns += fit ? each.shape[0] : 0;
  }
  expect(fit && columns == s.oc, seen, numbers(shape) + (weights.size() == 1 ? "" : " in all"));
  expect(int64_t(s.kh) * s.kw * shape[1] <= WEIGHT_LIMIT / s.oc, "weight of shape " + numbers(shape),
         "fewer than 2^31 elements");
}

void Builder::expect_tile(const ConvSpec &s) const {
  if (s.tile == std::array<int32_t, 2>{})
    return;
  std::string allowed;
  bool found = false;
  for (const WinogradTile &t : winograd_tiles()) {
    found = found || (t.kh == s.kh && t.kw == s.kw && t.h == s.tile[0] && t.w == s.tile[1]);
    allowed += (allowed.empty() ? "" : ", ") + numbers({t.h, t.w}) + " for " + numbers({t.kh, t.kw});
  }
  expect(found, "tile " + numbers({s.tile[0], s.tile[1]}) + " for kernel " + numbers({s.kh, s.kw}), allowed);
  expect(s.stride[0] == 1 && s.stride[1] == 1 && s.groups == 1,
         "a tile with stride " + numbers({s.stride[0], s.stride[1]}) + " and " + std::to_string(s.groups) + " groups",
         "stride (1, 1), 1 group");
}

std::vector<Range> Builder::ranges_of(const ConvOp &op, const std::vector<OutputSpec> &outputs) const {
  std::vector<Range> ranges;
  int64_t columns = 0;
  for (const OutputSpec &output : outputs) {
    Range range{view(output.view, "output"), output.relu};
    expect_map(range.y, "output", op.n, op.oh, op.ow, range.y.channels);
    columns += range.y.channels;
    ranges.push_back(range);
  }
  expect(columns == op.oc, "outputs of " + std::to_string(columns) + " channels", std::to_string(op.oc));
  return ranges;
}

// The panels, the chunks and how threads and tiles walk them.
void Builder::schedule(ConvOp &op, const ConvSpec &s, const std::vector<Range> &ranges) {
  const Tier &tier = *plan_->tier_;
  if (op.tile_h > 0) {
    lay_out_points(op);
  } else if (!op.depthwise) {
    walk_directly(op, s.padding[2] > 0 || s.padding[3] > 0, tier.rows);
    lay_out_rows(op, tier.k_multiple);
    join_taps(op, tier.k_multiple);
  }
  plan_->panels_.push_back(panels_of(op, ranges, tier.lanes));
  Type summed = op.depthwise ? Type::float32 : op.x.type;
  plan_->chunks_.push_back(chunks_of(summed, op.c / op.groups, op.kh * op.kw));
  op.panels = plan_->panels_.back().data();
  op.chunks = plan_->chunks_.back().data();
  op.panel_count = static_cast<int32_t>(plan_->panels_.back().size());
  op.chunk_count = static_cast<int32_t>(plan_->chunks_.back().size());
  auto scratch = op.tile_h > 0 ? tier.winograd->scratch : op.depthwise ? tier.depthwise_scratch : tier.conv_scratch;
  plan_->scratch_bytes_ = std::max(plan_->scratch_bytes_, scratch(op));
}

// The operator but for its outputs.
ConvOp Builder::conv_op(const ConvSpec &s, const View &x) const {
  ConvOp op{};
  op.n = s.n, op.h = s.h, op.w = s.w, op.c = s.c, op.oc = s.oc, op.kh = s.kh, op.kw = s.kw, op.groups = s.groups;
  op.stride_h = s.stride[0], op.stride_w = s.stride[1], op.top = s.padding[0], op.left = s.padding[2];
  op.tile_h = s.tile[0], op.tile_w = s.tile[1];
  op.oh = out_size(s.h, s.kh, s.stride[0], int64_t(s.padding[0]) + s.padding[1]);
  op.ow = out_size(s.w, s.kw, s.stride[1], int64_t(s.padding[2]) + s.padding[3]);
  op.y_map = int64_t(op.oh) * op.ow, op.y_row = op.ow;
  op.x = x;
  op.residual.buffer = -1;
  op.residual_scale = 1.0f;
  return op;
}

void Builder::conv(const ConvSpec &s, ViewSpec x, const ConvArrays &arrays, const std::vector<OutputSpec> &outputs,
                   const ViewSpec *residual, float residual_scale) {
  expect_conv(s, arrays);
  ConvOp op = conv_op(s, view(x, "input"));
  expect_map(op.x, "input", s.n, s.h, s.w, s.c);
  expect_tile(s);
  op.depthwise = s.groups > 1 && s.groups == s.c;
  std::vector<Range> ranges = ranges_of(op, outputs);
  std::vector<View> reads{op.x}, writes;
  for (const Range &range : ranges)
    writes.push_back(range.y);
  op.residual_scale = residual_scale;
  if (residual) {
    expect(outputs.size() == 1, "a residual with " + std::to_string(outputs.size()) + " outputs", "one output");
    op.residual = view(*residual, "residual");
    expect_map(op.residual, "residual", s.n, op.oh, op.ow, s.oc);
    reads.push_back(op.residual);
  }
  schedule(op, s, ranges);
  queue_packing(op, 0, arrays);
  add({op, 0, false, false}, reads, writes, false, weight_count(op) * op.n * op.oh * op.ow);
}

void Builder::pair(const ConvSpec &a, const ConvSpec &b, ViewSpec x, ViewSpec between, bool between_relu,
                   const ConvArrays &a_arrays, const ConvArrays &b_arrays, const std::vector<OutputSpec> &outputs) {
  expect_conv(a, a_arrays);
  expect_conv(b, b_arrays);
  expect(a.tile == std::array<int32_t, 2>{} && b.tile == a.tile, "tiles in a pair", "none");
  bool columns = b.kw == 1 && b.stride[1] == 1 && b.padding[2] == 0 && b.padding[3] == 0;
  bool rows = b.kh == 1 && b.stride[0] == 1 && b.padding[0] == 0 && b.padding[1] == 0;
  expect(columns || rows, "a second kernel of " + numbers({b.kh, b.kw}),
         "1xn or nx1, without stride or padding along the 1");
  PairOp op{};
  op.rows = rows && !columns;
  op.first = conv_op(a, view(x, "input"));
  expect_map(op.first.x, "input", a.n, a.h, a.w, a.c);
  View middle = view(between, "intermediate");
  expect(plan_->buffers_[middle.buffer].kind == BufferKind::local && middle.channels == middle.pitch,
         "intermediate " + text(middle), "all channels of a buffer of kind local");
  expect_map(middle, "intermediate", b.n, b.h, b.w, b.c);
  expect_map(middle, "intermediate", a.n, op.first.oh, op.first.ow, a.oc);
  middle.buffer = LOCAL;
  op.second = conv_op(b, middle);
  op.first.strips = op.second.strips = true;
  std::vector<Range> ranges = ranges_of(op.second, outputs);
  std::vector<View> writes;
  for (const Range &range : ranges)
    writes.push_back(range.y);
  schedule(op.first, a, {{middle, between_relu}});
  size_t scratch = plan_->tier_->conv_scratch(op.first);
  queue_packing(op.first, 0, a_arrays);
  schedule(op.second, b, ranges);
  queue_packing(op.second, 1, b_arrays);
  int64_t item = middle.type == Type::bfloat16 ? 2 : 4;
  op.local_bytes = (item * op.second.h * op.second.w * op.second.c + 63) / 64 * 64;
  scratch = std::max(scratch, plan_->tier_->conv_scratch(op.second)) + op.local_bytes;
  plan_->scratch_bytes_ = std::max(plan_->scratch_bytes_, scratch);
  int64_t work = weight_count(op.first) * a.n * op.first.oh * op.first.ow;
  add({op, 0, false, false}, {op.first.x}, writes, false, work + weight_count(op.second) * b.n * b.h * b.w);
}

void Builder::pool(const PoolSpec &s, ViewSpec x, ViewSpec y, Vector shift, bool relu) {
  expect(std::min({s.h, s.w, s.c, s.kh, s.kw, s.stride[0], s.stride[1]}) >= 1,
         "sizes " + numbers({s.h, s.w, s.c, s.kh, s.kw, s.stride[0], s.stride[1]}), "1 or more");
  auto [top, bottom, left, right] = s.padding;
  expect(std::min({top, bottom, left, right, s.overhang[0], s.overhang[1]}) >= 0, "negative padding or overhang",
         "0 or more");
  expect(std::max(top, bottom) < s.kh && std::max(left, right) < s.kw, "padding " + numbers({top, bottom, left, right}),
         "less than the kernel " + numbers({s.kh, s.kw}));
  int64_t pad_h = int64_t(top) + bottom + s.overhang[0], pad_w = int64_t(left) + right + s.overhang[1];
  expect(s.h + pad_h >= s.kh && s.w + pad_w >= s.kw, "kernel " + numbers({s.kh, s.kw}),
         "not larger than the padded map");
  PoolOp op{};
  op.n = s.n, op.h = s.h, op.w = s.w, op.c = s.c, op.kh = s.kh, op.kw = s.kw;
  op.stride_h = s.stride[0], op.stride_w = s.stride[1];
  op.top = top, op.bottom = bottom, op.left = left, op.right = right;
  op.oh = out_size(s.h, s.kh, s.stride[0], pad_h), op.ow = out_size(s.w, s.kw, s.stride[1], pad_w);
  op.maximum = s.maximum, op.count_include_pad = s.count_include_pad, op.relu = relu;
  op.x = view(x, "input");
  op.y = view(y, "output");
  expect_map(op.x, "input", s.n, s.h, s.w, s.c);
  expect_map(op.y, "output", s.n, op.oh, op.ow, s.c);
  op.shift = constant(shift, s.c, "shift");
  add({op, 0, false, false}, {op.x}, {op.y}, false, int64_t(s.n) * op.oh * op.ow * s.c * s.kh * s.kw);
}

void Builder::eltwise(ViewSpec x, ViewSpec y, Vector scale, Vector shift, bool relu, const ViewSpec *residual,
                      float residual_scale) {
  EltwiseOp op{};
  op.x = view(x, "input");
  op.y = view(y, "output");
  expect_same_map(op.x, op.y);
  op.pixels = pixels_of(op.x);
  op.scale = constant(scale, op.x.channels, "scale");
  op.shift = constant(shift, op.x.channels, "shift");
  op.relu = relu;
  op.residual.buffer = -1;
  op.residual_scale = residual_scale;
  std::vector<View> reads{op.x};
  if (residual) {
    op.residual = view(*residual, "residual");
    expect_same_map(op.x, op.residual);
    reads.push_back(op.residual);
  }
  add({op, 0, false, false}, reads, {op.y}, true, op.pixels * op.x.channels);
}

void Builder::import(int32_t source, ViewSpec y, Vector scale, Vector shift) {
  int64_t count = static_cast<int64_t>(plan_->inputs_.size());
  expect(source >= 0 && source < count, "input " + std::to_string(source),
         "one of " + std::to_string(count) + " inputs");
  const Shape &s = plan_->inputs_[source];
  ImportOp op{};
  op.source = source, op.n = images_ ? images_ : s.n, op.h = s.h, op.w = s.w;
  op.y = view(y, "output");
  expect_map(op.y, "output", op.n, s.h, s.w, s.c);
  op.scale = constant(scale, s.c, "scale");
  op.shift = constant(shift, s.c, "shift");
  plan_->scratch_bytes_ = std::max(plan_->scratch_bytes_, sizeof(float) * plan_->tier_->import_pixels * size_t(s.c));
  add({op, 0, false, false}, {}, {op.y}, false, int64_t(op.n) * s.h * s.w * s.c);
}

void Builder::lrn(ViewSpec x, ViewSpec y, int32_t size, float alpha, float beta, float k) {
  LrnOp op{};
  op.x = view(x, "input");
  op.y = view(y, "output");
  expect_same_map(op.x, op.y);
  expect(size >= 1 && size <= (1 << 20), "window of " + std::to_string(size) + " channels", "1 to 1048576");
  op.pixels = pixels_of(op.x);
  op.size = size, op.alpha = alpha, op.beta = beta, op.k = k;
  size_t row = sizeof(float) * (size_t(op.x.channels) + size + plan_->tier_->lanes);
  plan_->scratch_bytes_ = std::max(plan_->scratch_bytes_, row);
  add({op, 0, false, false}, {op.x}, {op.y}, true, op.pixels * op.x.channels * 4);
}

void Builder::normalize(ViewSpec x, ViewSpec y, float eps) {
  NormalizeOp op{};
  op.x = view(x, "input");
  op.y = view(y, "output");
  expect_same_map(op.x, op.y);
  op.pixels = pixels_of(op.x);
  op.eps = eps;
  add({op, 0, false, false}, {op.x}, {op.y}, true, op.pixels * op.x.channels);
}

// Which operators run on which images, and which wait for others.
void Builder::order() {
  int32_t batch = plan_->inputs_.empty() ? 0 : plan_->inputs_[0].n;
  plan_->runs_ = runs_of(accesses_, batch);
  auto expect_batch = [&](int32_t n, const std::string &what) {
    expect(images_ == 0 || n == batch, what + " of " + std::to_string(n) + " images", std::to_string(batch));
  };
  for (const Shape &input : plan_->inputs_)
    expect_batch(input.n, "an input");
  for (const Buffer &buffer : plan_->buffers_)
    if (buffer.kind == BufferKind::output)
      expect_batch(buffer.n, "an output");
  std::vector<bool> fences = follow(plan_->runs_, accesses_, plan_->buffers_);
  for (size_t i = 0; i < fences.size(); ++i)
    plan_->ops_[i].fence = fences[i];
}

std::unique_ptr<Plan> Builder::build(const Plan *like) {
  int64_t outputs = 0, high = -1;
  for (const Buffer &buffer : plan_->buffers_)
    if (buffer.kind == BufferKind::output) {
      ++outputs;
      expect(buffer.position >= 0, "output position " + std::to_string(buffer.position), "0 or more");
      high = std::max(high, buffer.position);
    }
  expect(high + 1 == outputs, "output position " + std::to_string(high),
         "positions without a gap, below " + std::to_string(outputs));
  order();
  plan_->packing_ = packing();
  if (like) {
    expect(like->tier_ == plan_->tier_ && like->packing_ == plan_->packing_,
           "weights of a plan with other convolutions",
           "those of a plan with the same ones, for tier " + std::string(plan_->tier_->name));
    plan_->packed_ = like->packed_;
    plan_->finite_ = like->finite_;
  } else {
    pack_all();
  }
  point_at_weights();
  return std::move(plan_);
}

} // namespace inception_fast::cpu
