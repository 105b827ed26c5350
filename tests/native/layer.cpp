#include "layer.h"

#include "memory.h"
#include "scene.h"

#include <stdexcept>

namespace native_driver {

static const Tier &tier_named(const std::string &name) {
  std::string allowed;
  for (const Tier *tier : runnable_tiers()) {
    if (name == tier->name)
      return *tier;
    allowed += std::string(allowed.empty() ? "" : ", ") + tier->name;
  }
  throw std::invalid_argument("tier '" + name + "'; this machine can run: " + allowed);
}

static ConvArrays whole(const ConvStep &step) {
  const ConvSpec &s = step.spec;
  int64_t taps = int64_t(s.kh) * s.kw;
  WeightArray weight{step.weight.data(), {s.oc, s.c, s.kh, s.kw}, {s.c * taps, taps, s.kw, 1}};
  return {{weight}, {step.scale.data(), s.oc}, {step.shift.data(), s.oc}};
}

static void add_conv(Builder &builder, const ConvStep &step, ViewSpec x, ViewSpec y) {
  builder.conv(step.spec, x, whole(step), {{y, true}}, nullptr, 1);
}

static void add_fused(Builder &builder, const std::vector<ConvStep> &steps, ViewSpec x, ViewSpec between, ViewSpec y) {
  builder.pair(steps[0].spec, steps[1].spec, x, between, true, whole(steps[0]), whole(steps[1]), {{y, true}});
}

static ConvStep step_of(const Layer &l, Rng &rng, int c, int oc, int kh, int kw) {
  ConvSpec s{l.n, l.h, l.w, c, oc, kh, kw, {1, 1}, {kh / 2, kh / 2, kw / 2, kw / 2}, 1};
  return {s, rng.integers(int64_t(oc) * c * kh * kw, -1, 1), rng.integers(oc, 1, 1), rng.integers(oc, 0, 3), 1};
}

std::string run_layer(const Layer &l) {
  if (l.kind != "conv" && l.kind != "pair" && l.kind != "fused")
    throw std::invalid_argument("kind '" + l.kind + "'; allowed: conv, pair, fused");
  if (l.type != "float32" && l.type != "bfloat16")
    throw std::invalid_argument("type '" + l.type + "'; allowed: float32, bfloat16");
  if (l.kh % 2 == 0 || l.kw % 2 == 0)
    throw std::invalid_argument("an even kernel; allowed: odd");
  Type type = l.type == "float32" ? Type::float32 : Type::bfloat16;
  bool fused = l.kind == "fused", pair = fused || l.kind == "pair";
  int64_t pixels = int64_t(l.n) * l.h * l.w, item = size_of(type);
  int64_t arena_bytes = pair && !fused ? (pixels * l.mid * item + 63) / 64 * 64 : 0;
  Rng rng{std::mt19937(1)};
  Builder builder(tier_named(l.tier), arena_bytes);
  builder.input({l.n, l.c, l.h, l.w});
  builder.buffer({l.n, l.h, l.w, l.c, BufferKind::input, 0, type});
  builder.buffer({l.n, l.h, l.w, l.oc, BufferKind::output, 0, type});
  std::vector<ConvStep> steps;
  if (pair) {
    builder.buffer({l.n, l.h, l.w, l.mid, fused ? BufferKind::local : BufferKind::arena, 0, type});
    steps.push_back(step_of(l, rng, l.c, l.mid, l.first_tall ? l.kh : 1, l.first_tall ? 1 : l.kw));
    steps.push_back(step_of(l, rng, l.mid, l.oc, l.first_tall ? 1 : l.kh, l.first_tall ? l.kw : 1));
  } else {
    steps.push_back(step_of(l, rng, l.c, l.oc, l.kh, l.kw));
  }
  int64_t macs = 0, weights = 0;
  for (size_t i = 0; i < steps.size(); ++i) {
    const ConvSpec &s = steps[i].spec;
    bool last = i + 1 == steps.size();
    if (!fused) {
      builder.step("conv");
      add_conv(builder, steps[i], i == 0 ? ViewSpec{0, 0, l.c} : ViewSpec{2, 0, l.mid},
               last ? ViewSpec{1, 0, l.oc} : ViewSpec{2, 0, l.mid});
    } else if (last) {
      builder.step("pair");
      add_fused(builder, steps, {0, 0, l.c}, {2, 0, l.mid}, {1, 0, l.oc});
    }
    weights += int64_t(s.oc) * s.c * s.kh * s.kw;
    macs += pixels * s.oc * s.c * s.kh * s.kw;
  }
  std::unique_ptr<Plan> plan = builder.build(nullptr);
  Guarded x(pixels * l.c * item, false), y(pixels * l.oc * item, false), arena(arena_bytes, false);
  for (int64_t i = 0; i < pixels * l.c; ++i)
    put(type, x.data(), i, static_cast<float>(i % 7 - 3));
  int64_t line = l.c;
  Input input{x.data(), type, line * l.w * l.h, 1, line * l.w, line};
  for (int i = 0; i < l.repeats; ++i)
    plan->run({input}, {y.data()}, arena.data(), l.threads, {});
  double sum = 0;
  for (int64_t i = 0; i < pixels * l.oc; ++i)
    sum += get(type, y.data(), i);
  return "{\"macs\": " + std::to_string(macs) + ", \"weight_bytes\": " + std::to_string(weights * item) +
         ", \"packed_bytes\": " + std::to_string(plan->packed_bytes()) +
         ", \"input_bytes\": " + std::to_string(x.bytes()) + ", \"middle_bytes\": " + std::to_string(arena_bytes) +
         ", \"output_bytes\": " + std::to_string(y.bytes()) + ", \"repeats\": " + std::to_string(l.repeats) +
         ", \"sum\": " + std::to_string(sum) + "}";
}

} // namespace native_driver
