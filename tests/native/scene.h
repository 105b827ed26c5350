// A plan together with its truth: both are recorded step by step and then run, the one by the kernels, the other by
// truth.h, in the same places of two memories.
#pragma once

#include "truth.h"

#include <functional>
#include <random>

namespace native_driver {

// Some channels of a buffer and what is known of their values.
struct Map {
  View view;
  int n, h, w;
  double bound;  // no value is larger
  bool integers; // all values are
  int64_t pixels() const { return int64_t(n) * h * w; }
};

struct Rng {
  std::mt19937 engine;
  int between(int low, int high) { return low + static_cast<int>(engine() % static_cast<unsigned>(high - low + 1)); }
  bool one_in(int count) { return between(1, count) == 1; }
  Values integers(int64_t count, int low, int high);
};

struct ConvStep {
  ConvSpec spec;
  Values weight, scale, shift; // weight is [oc, c / groups, kh, kw]
  float residual_scale = 1;
};

class Scene {
public:
  explicit Scene(Rng &rng) : rng_(rng), tight_(rng.one_in(2)) {}

  // A buffer of before + c + after channels in the arena, perhaps where a retired one was.
  Map room(int n, int h, int w, int c, Type type, int before = 0, int after = 0);
  // One that the caller of the plan hands over.
  Map output(int n, int h, int w, int c, Type type);
  // A tensor of random integers in a random order of its dimensions. Returns its number.
  int input(Shape shape, Type type, int special);
  // Its memory serves others from now on.
  void retire(const Map &map);

  void import(int source, Map &y, Values scale, Values shift);
  void conv(ConvStep step, const Map &x, std::vector<Target> targets, const Map *residual);
  // Two convolutions as one operator, over an intermediate of this type.
  void pair(ConvStep first, ConvStep second, const Map &x, Type between, bool between_relu,
            std::vector<Target> targets);
  void pool(const PoolSpec &spec, const Map &x, const Map &y, Values shift, bool relu);
  void eltwise(const Map &x, const Map &y, Values scale, Values shift, bool relu, const Map *residual,
               float residual_scale);
  void lrn(const Map &x, const Map &y, int size, float alpha, float beta, float k);
  void normalize(const Map &x, const Map &y, float eps);

  // Runs on every number of threads, each time in fresh memory, by so many callers at once. Raises std::runtime_error
  // where memory differs from the truth.
  void check(const Tier &tier, const std::vector<int> &threads, int callers);

private:
  struct Step {
    std::function<void(Builder &)> build;
    std::function<void(const Maps &)> truth;
  };
  struct Tensor {
    Shape shape;
    Type type;
    int64_t n, c, h, w; // strides
    std::unique_ptr<Guarded> memory;
  };
  struct Memory {
    std::unique_ptr<Guarded> arena;
    std::vector<std::unique_ptr<Guarded>> outputs;
    Maps maps;
  };

  Map add(Buffer buffer, int offset, int channels);
  void add(std::function<void(Builder &)> build, std::function<void(const Maps &)> truth);
  std::unique_ptr<Plan> plan(const Tier &tier, const Plan *like) const;
  std::unique_ptr<Memory> memory() const;
  void guard(const Memory &memory, bool on) const;
  void run(const Plan &plan, int threads) const;

  Rng &rng_;
  bool tight_; // no guard behind the last buffer: the arena ends where memory does
  std::vector<Buffer> buffers_;
  std::vector<Tensor> inputs_;
  std::vector<Step> steps_;
  std::vector<std::pair<int64_t, int64_t>> free_; // position and bytes of retired buffers
  int64_t end_ = GUARD;
  int outputs_ = 0;
  std::unique_ptr<Memory> truth_;
};

} // namespace native_driver
