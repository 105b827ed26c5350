#include "scene.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <thread>

namespace native_driver {

Values Rng::integers(int64_t count, int low, int high) {
  Values values(count);
  for (float &value : values)
    value = static_cast<float>(between(low, high));
  return values;
}

static ViewSpec spec_of(const View &view) { return {view.buffer, view.offset, view.channels}; }

static Vector vector_of(const Values &values) {
  return values.empty() ? Vector{} : Vector{values.data(), static_cast<int64_t>(values.size())};
}

// The weights of a step as a caller may have them: in parts, each in any order of its dimensions.
struct Parts {
  std::vector<Values> memory;
  std::vector<WeightArray> arrays;
};

static Parts parts_of(const ConvStep &step) {
  const ConvSpec &s = step.spec;
  Rng rng{std::mt19937(static_cast<unsigned>(step.weight.size()))}; // not the plan's, whose choices stay as they are
  const std::array<int64_t, 3> sizes{s.c / s.groups, s.kh, s.kw};
  const int64_t depth = sizes[0] * sizes[1] * sizes[2];
  Parts out;
  for (int first = 0; first < s.oc;) {
    int64_t columns = rng.one_in(3) ? s.oc - first : rng.between(1, s.oc - first);
    const std::array<int64_t, 4> shape{columns, sizes[0], sizes[1], sizes[2]};
    std::array<int, 4> order{3, 2, 1, 0};
    std::shuffle(order.begin(), order.end(), rng.engine);
    WeightArray array{nullptr, {shape.begin(), shape.end()}, {0, 0, 0, 0}};
    int64_t apart = 1;
    for (int dimension : order) {
      array.strides[dimension] = apart;
      apart *= shape[dimension];
    }
    Values memory(columns * depth);
    for (int64_t i = 0; i < columns * depth; ++i) {
      int64_t at = i / depth * array.strides[0] + i / (sizes[1] * sizes[2]) % sizes[0] * array.strides[1] +
                   i / sizes[2] % sizes[1] * array.strides[2] + i % sizes[2] * array.strides[3];
      memory[at] = step.weight[first * depth + i];
    }
    out.memory.push_back(std::move(memory));
    array.data = out.memory.back().data();
    out.arrays.push_back(std::move(array));
    first += static_cast<int>(columns);
  }
  return out;
}

static ConvArrays arrays_of(const ConvStep &step, const Parts &parts) {
  return {parts.arrays, vector_of(step.scale), vector_of(step.shift)};
}

Map Scene::add(Buffer buffer, int offset, int channels) {
  buffers_.push_back(buffer);
  int32_t index = static_cast<int32_t>(buffers_.size()) - 1;
  return {{index, offset, channels, buffer.c, buffer.type}, buffer.n, buffer.h, buffer.w, 0, true};
}

Map Scene::room(int n, int h, int w, int c, Type type, int before, int after) {
  Buffer buffer{n, h, w, before + c + after, BufferKind::arena, end_, type};
  auto found = std::find_if(free_.begin(), free_.end(), [&](auto &place) { return place.second >= buffer.bytes(); });
  if (found != free_.end()) {
    buffer.position = found->first;
    free_.erase(found);
  } else {
    end_ += (buffer.bytes() + 63) / 64 * 64 + GUARD;
  }
  return add(buffer, before, c);
}

Map Scene::output(int n, int h, int w, int c, Type type) {
  return add({n, h, w, c, BufferKind::output, outputs_++, type}, 0, c);
}

void Scene::retire(const Map &map) {
  const Buffer &buffer = buffers_[map.view.buffer];
  if (buffer.kind == BufferKind::arena)
    free_.push_back({buffer.position, buffer.bytes()});
}

int Scene::input(Shape shape, Type type, int special) {
  std::array<int, 4> sizes{shape.n, shape.c, shape.h, shape.w}, order{0, 1, 2, 3};
  std::array<int64_t, 4> strides;
  std::shuffle(order.begin(), order.end(), rng_.engine);
  int64_t elements = 1;
  for (int dimension : order) {
    strides[dimension] = elements;
    elements *= sizes[dimension];
  }
  Tensor tensor{shape, type, strides[0], strides[1], strides[2], strides[3], nullptr};
  tensor.memory = std::make_unique<Guarded>(elements * size_of(type), rng_.one_in(2));
  for (int64_t i = 0; i < elements; ++i)
    put(type, tensor.memory->data(), i,
        static_cast<float>(type == Type::uint8 ? rng_.between(0, 255) : rng_.between(-4, 4)));
  constexpr float INFINITE = std::numeric_limits<float>::infinity(), NAN_ = std::numeric_limits<float>::quiet_NaN();
  for (int i = 0; i < special && elements > 0; ++i)
    put(type, tensor.memory->data(), rng_.between(0, static_cast<int>(elements) - 1),
        rng_.one_in(3)   ? (i % 2 ? NAN_ : -NAN_)
        : rng_.one_in(2) ? INFINITE
                         : -INFINITE);
  inputs_.push_back(std::move(tensor));
  return static_cast<int>(inputs_.size()) - 1;
}

void Scene::add(std::function<void(Builder &)> build, std::function<void(const Maps &)> truth) {
  steps_.push_back({std::move(build), std::move(truth)});
}

void Scene::import(int source, Map &y, Values scale, Values shift) {
  y.bound = (inputs_[source].type == Type::uint8 ? 255 : 4) * (scale.empty() ? 1 : 3) + (shift.empty() ? 0 : 9);
  auto kept = std::make_shared<std::pair<Values, Values>>(std::move(scale), std::move(shift));
  Shape shape = inputs_[source].shape;
  View view = y.view;
  add([=](Builder &b) { b.import(source, spec_of(view), vector_of(kept->first), vector_of(kept->second)); },
      [=](const Maps &maps) { native_driver::import(maps, source, shape, view, kept->first, kept->second); });
}

void Scene::conv(ConvStep step, const Map &x, std::vector<Target> targets, const Map *residual) {
  auto kept = std::make_shared<ConvStep>(std::move(step));
  auto parts = std::make_shared<Parts>(parts_of(*kept));
  View from = x.view, left = residual ? residual->view : View{};
  bool adds = residual;
  auto build = [=](Builder &b) {
    std::vector<OutputSpec> outputs;
    for (const Target &target : targets)
      outputs.push_back({spec_of(target.y), target.relu});
    ViewSpec added = spec_of(left);
    b.conv(kept->spec, spec_of(from), arrays_of(*kept, *parts), outputs, adds ? &added : nullptr, kept->residual_scale);
  };
  add(build, [=](const Maps &maps) {
    native_driver::conv(maps, kept->spec, from, kept->weight, kept->scale, kept->shift, targets, adds ? &left : nullptr,
                        kept->residual_scale);
  });
}

void Scene::pair(ConvStep first, ConvStep second, const Map &x, Type type, bool between_relu,
                 std::vector<Target> targets) {
  auto kept = std::make_shared<std::pair<ConvStep, ConvStep>>(std::move(first), std::move(second));
  auto parts = std::make_shared<std::pair<Parts, Parts>>(parts_of(kept->first), parts_of(kept->second));
  const ConvSpec &b = kept->second.spec;
  View from = x.view, between = add({b.n, b.h, b.w, b.c, BufferKind::local, 0, type}, 0, b.c).view;
  int64_t bytes = buffers_.back().bytes();
  auto build = [=](Builder &builder) {
    std::vector<OutputSpec> outputs;
    for (const Target &target : targets)
      outputs.push_back({spec_of(target.y), target.relu});
    builder.pair(kept->first.spec, kept->second.spec, spec_of(from), spec_of(between), between_relu,
                 arrays_of(kept->first, parts->first), arrays_of(kept->second, parts->second), outputs);
  };
  add(build, [=](const Maps &maps) {
    std::vector<float> memory(bytes / 2 + 1);
    Maps inner = maps;
    inner.bases[between.buffer] = memory.data();
    const auto &[one, two] = *kept;
    native_driver::conv(inner, one.spec, from, one.weight, one.scale, one.shift, {{between, between_relu}}, nullptr, 1);
    native_driver::conv(inner, two.spec, between, two.weight, two.scale, two.shift, targets, nullptr, 1);
  });
}

void Scene::pool(const PoolSpec &spec, const Map &x, const Map &y, Values shift, bool relu) {
  auto kept = std::make_shared<Values>(std::move(shift));
  View from = x.view, to = y.view;
  add([=](Builder &b) { b.pool(spec, spec_of(from), spec_of(to), vector_of(*kept), relu); },
      [=](const Maps &maps) { native_driver::pool(maps, spec, from, to, *kept, relu); });
}

void Scene::eltwise(const Map &x, const Map &y, Values scale, Values shift, bool relu, const Map *residual,
                    float residual_scale) {
  auto kept = std::make_shared<std::pair<Values, Values>>(std::move(scale), std::move(shift));
  View from = x.view, to = y.view, left = residual ? residual->view : View{};
  bool adds = residual;
  int64_t pixels = x.pixels();
  auto build = [=](Builder &b) {
    ViewSpec added = spec_of(left);
    b.eltwise(spec_of(from), spec_of(to), vector_of(kept->first), vector_of(kept->second), relu,
              adds ? &added : nullptr, residual_scale);
  };
  add(build, [=](const Maps &maps) {
    native_driver::eltwise(maps, pixels, from, to, kept->first, kept->second, relu, adds ? &left : nullptr,
                           residual_scale);
  });
}

void Scene::lrn(const Map &x, const Map &y, int size, float alpha, float beta, float k) {
  View from = x.view, to = y.view;
  int64_t pixels = x.pixels();
  add([=](Builder &b) { b.lrn(spec_of(from), spec_of(to), size, alpha, beta, k); },
      [=](const Maps &maps) { native_driver::lrn(maps, pixels, from, to, size, alpha, beta, k); });
}

void Scene::normalize(const Map &x, const Map &y, float eps) {
  View from = x.view, to = y.view;
  int64_t pixels = x.pixels();
  add([=](Builder &b) { b.normalize(spec_of(from), spec_of(to), eps); },
      [=](const Maps &maps) { native_driver::normalize(maps, pixels, from, to, eps); });
}

std::unique_ptr<Plan> Scene::plan(const Tier &tier, const Plan *like) const {
  Builder builder(tier, tight_ ? end_ - GUARD : end_);
  for (const Tensor &input : inputs_)
    builder.input(input.shape);
  for (const Buffer &buffer : buffers_)
    builder.buffer(buffer);
  for (size_t i = 0; i < steps_.size(); ++i) {
    builder.step("step " + std::to_string(i));
    steps_[i].build(builder);
  }
  return builder.build(like);
}

std::unique_ptr<Scene::Memory> Scene::memory() const {
  auto out = std::make_unique<Memory>();
  out->arena = std::make_unique<Guarded>(tight_ ? end_ - GUARD : end_, true);
  for (const Buffer &buffer : buffers_)
    if (buffer.kind == BufferKind::output)
      out->outputs.push_back(std::make_unique<Guarded>(buffer.bytes(), tight_));
  for (const Buffer &buffer : buffers_)
    out->maps.bases.push_back(buffer.kind == BufferKind::local   ? nullptr
                              : buffer.kind == BufferKind::arena ? out->arena->data() + buffer.position
                                                                 : out->outputs[buffer.position]->data());
  for (const Tensor &x : inputs_)
    out->maps.inputs.push_back({x.memory->data(), x.type, x.n, x.c, x.h, x.w});
  return out;
}

void Scene::guard(const Memory &memory, bool on) const {
  const unsigned char *arena = memory.arena->data();
  allow(arena, memory.arena->bytes());
  if (!on)
    return;
  forbid(arena, memory.arena->bytes());
  for (const Buffer &buffer : buffers_)
    if (buffer.kind == BufferKind::arena)
      allow(arena + buffer.position, buffer.bytes());
}

void Scene::run(const Plan &plan, int threads) const {
  std::unique_ptr<Memory> found = memory();
  std::vector<void *> outputs;
  for (const auto &output : found->outputs)
    outputs.push_back(output->data());
  guard(*found, true);
  plan.run(found->maps.inputs, outputs, found->arena->data(), threads, {});
  guard(*found, false);
  std::string where = "tier " + std::string(plan.tier().name) + ", " + std::to_string(threads) + " threads: ";
  std::string wrong = difference(found->arena->data(), truth_->arena->data(), found->arena->bytes());
  if (!wrong.empty())
    throw std::runtime_error(where + "the arena's " + wrong);
  for (size_t i = 0; i < outputs.size(); ++i) {
    wrong = difference(found->outputs[i]->data(), truth_->outputs[i]->data(), found->outputs[i]->bytes());
    if (!wrong.empty())
      throw std::runtime_error(where + "output " + std::to_string(i) + "'s " + wrong);
  }
}

void Scene::check(const Tier &tier, const std::vector<int> &threads, int callers) {
  if (!truth_) {
    truth_ = memory();
    for (const Step &step : steps_)
      step.truth(truth_->maps);
  }
  std::unique_ptr<Plan> first = plan(tier, nullptr), second = plan(tier, first.get());
  std::vector<std::string> wrong(callers);
  auto work = [&](int caller) {
    try {
      for (size_t i = 0; i < threads.size(); ++i)
        run(caller % 2 ? *second : *first, threads[(i + caller) % threads.size()]);
    } catch (const std::exception &error) {
      wrong[caller] = error.what();
    }
  };
  std::vector<std::thread> others;
  for (int caller = 1; caller < callers; ++caller)
    others.emplace_back(work, caller);
  work(0);
  for (std::thread &other : others)
    other.join();
  first.reset(); // the second one keeps the weights that they share
  if (wrong[0].empty())
    run(*second, threads[0]);
  for (const std::string &text : wrong)
    if (!text.empty())
      throw std::runtime_error(text);
}

} // namespace native_driver
