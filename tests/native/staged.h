// A chain of steps that run more and more images at a time, beside the same chain of whole steps.
#pragma once

#include "scene.h"

#include <memory>

namespace native_driver {

class Staged {
public:
  // Convolutions, pools and scalings of any size; numbers of images that divide each other.
  explicit Staged(Rng &rng);
  // Raises std::runtime_error where an output differs from that of whole steps on any of these numbers of threads.
  void check(const Tier &tier, const std::vector<int> &threads) const;

private:
  enum class Kind { convolution, pool, scaling };
  struct Step {
    Kind kind;
    ConvStep conv; // of a pool its sizes, of a scaling its scale and shift
    int images;
  };
  std::unique_ptr<Plan> plan(const Tier &tier, bool whole) const;
  void add(Builder &builder, const Step &step, int images, ViewSpec x, ViewSpec y) const;
  int64_t place(std::vector<Buffer> &buffers) const;
  std::unique_ptr<Guarded> run(const Plan &plan, int threads) const;

  Type type_;
  int batch_, h_, w_;
  std::vector<Step> steps_;
  std::vector<int> channels_; // before each step, and behind the last
  Values x_;
};

} // namespace native_driver
