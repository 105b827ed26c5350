#include "staged.h"

#include <algorithm>
#include <stdexcept>

namespace native_driver {

Staged::Staged(Rng &rng)
    : type_(rng.one_in(2) ? Type::float32 : Type::bfloat16), batch_(1), h_(rng.between(1, 9)), w_(rng.between(1, 9)) {
  bool many = rng.one_in(2); // enough for several threads
  channels_.push_back(rng.between(1, 5));
  int images = rng.between(1, 2), count = rng.between(2, 6);
  for (int i = 0; i < count; ++i) {
    int c = channels_.back(), oc = many ? rng.between(30, 70) : rng.between(1, 20);
    Kind kind = i == 0 || rng.one_in(2) ? Kind::convolution : rng.one_in(2) ? Kind::pool : Kind::scaling;
    if (kind != Kind::convolution)
      oc = c;
    int k = rng.one_in(2) ? 3 : 1;
    ConvSpec spec{0, h_, w_, c, oc, k, k, {1, 1}, {k / 2, k / 2, k / 2, k / 2}, 1};
    bool weights = kind == Kind::convolution;
    steps_.push_back({kind,
                      {spec, weights ? rng.integers(int64_t(oc) * c * k * k, -1, 1) : Values{}, rng.integers(oc, -1, 1),
                       rng.integers(oc, -3, 3), 1},
                      images});
    channels_.push_back(oc);
    if (i + 1 < count && rng.one_in(2))
      images *= rng.between(2, 3);
  }
  batch_ = images * rng.between(1, 2);
  x_ = rng.integers(int64_t(batch_) * h_ * w_ * channels_[0], -3, 3);
}

void Staged::add(Builder &builder, const Step &step, int images, ViewSpec x, ViewSpec y) const {
  const ConvSpec &s = step.conv.spec;
  Vector scale{step.conv.scale.data(), s.oc}, shift{step.conv.shift.data(), s.oc};
  if (step.kind == Kind::scaling)
    return builder.eltwise(x, y, scale, shift, true, nullptr, 1);
  if (step.kind == Kind::pool)
    return builder.pool({images, s.h, s.w, s.c, s.kh, s.kw, s.stride, s.padding, {0, 0}, true, true}, x, y, shift,
                        false);
  ConvSpec spec = s;
  spec.n = images;
  int64_t taps = int64_t(s.kh) * s.kw;
  WeightArray weight{step.conv.weight.data(), {s.oc, s.c, s.kh, s.kw}, {s.c * taps, taps, s.kw, 1}};
  builder.conv(spec, x, {{weight}, scale, shift}, {{y, true}}, nullptr, 1);
}

// What each step reads: in one of two places in turn, but that two stages share has a place of its own. Returns the
// bytes of the arena.
int64_t Staged::place(std::vector<Buffer> &buffers) const {
  auto lines = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  int64_t places[2] = {0, 0};
  for (size_t i = 0; i < steps_.size(); ++i) {
    buffers.push_back({steps_[i].images, h_, w_, channels_[i], BufferKind::arena, 0, type_});
    places[i % 2] = std::max(places[i % 2], lines(buffers[i].bytes()));
  }
  int64_t end = places[0] + places[1];
  for (size_t i = 0; i < steps_.size(); ++i)
    if (i > 0 && steps_[i - 1].images != steps_[i].images) {
      buffers[i].position = end;
      end += lines(buffers[i].bytes());
    } else {
      buffers[i].position = i % 2 ? places[0] : 0;
    }
  return end;
}

std::unique_ptr<Plan> Staged::plan(const Tier &tier, bool whole) const {
  std::vector<Buffer> buffers;
  int64_t arena_bytes = place(buffers);
  if (whole) {
    arena_bytes = 0;
    for (Buffer &buffer : buffers) {
      buffer.n = batch_, buffer.position = arena_bytes;
      arena_bytes += (buffer.bytes() + 63) / 64 * 64;
    }
  }
  Builder builder(tier, arena_bytes);
  builder.input({batch_, channels_[0], h_, w_});
  for (const Buffer &buffer : buffers)
    builder.buffer(buffer);
  builder.buffer({batch_, h_, w_, channels_.back(), BufferKind::output, 0, Type::float32});
  builder.step("import", whole ? 0 : steps_[0].images);
  builder.import(0, {0, 0, channels_[0]}, {}, {});
  for (size_t i = 0; i < steps_.size(); ++i) {
    int32_t at = static_cast<int32_t>(i);
    builder.step("step " + std::to_string(i), whole ? 0 : steps_[i].images);
    add(builder, steps_[i], whole ? batch_ : steps_[i].images, {at, 0, channels_[i]}, {at + 1, 0, channels_[i + 1]});
  }
  return builder.build(nullptr);
}

std::unique_ptr<Guarded> Staged::run(const Plan &plan, int threads) const {
  int64_t c = channels_[0], pixels = int64_t(batch_) * h_ * w_;
  auto y = std::make_unique<Guarded>(pixels * channels_.back() * sizeof(float), true);
  Guarded arena(plan.arena_bytes(), true);
  Input x{x_.data(), Type::float32, c * h_ * w_, 1, c * w_, c};
  std::vector<double> seconds(plan.steps());
  plan.run({x}, {y->data()}, arena.data(), threads, {threads % 2 ? seconds.data() : nullptr, nullptr});
  return y;
}

void Staged::check(const Tier &tier, const std::vector<int> &threads) const {
  std::unique_ptr<Guarded> truth = run(*plan(tier, true), 1);
  std::unique_ptr<Plan> staged = plan(tier, false);
  for (int count : threads) {
    std::unique_ptr<Guarded> found = run(*staged, count);
    std::string wrong = difference(found->data(), truth->data(), truth->bytes());
    if (!wrong.empty())
      throw std::runtime_error("tier " + std::string(tier.name) + ", " + std::to_string(count) +
                               " threads: the output's " + wrong);
  }
}

} // namespace native_driver
