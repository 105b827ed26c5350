// A weight gradient together with its truth, on small integers between guards.
#pragma once

#include "scene.h"

#include "weight_gradient_op.h"

namespace native_driver {

class Gradient {
public:
  // Any size, stride, padding, pitch and type, sometimes with an infinity or a NaN in x; or any tile, float32 at
  // stride 1.
  Gradient(Rng &rng, bool tiles);
  // Raises std::runtime_error where the result differs from the truth on any of these numbers of threads.
  void check(const Tier &tier, const std::vector<int> &threads) const;

private:
  WeightGradientOp op_{};
  std::unique_ptr<Guarded> x_, grad_, truth_;
  bool at_end_;
};

} // namespace native_driver
