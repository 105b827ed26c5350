// A pool in training and its gradient together with their truth, on small integers between guards.
#pragma once

#include "scene.h"

#include "train_pool_op.h"

namespace native_driver {

class TrainedPool {
public:
  // Any size, window, pitch and type. Averages have windows whose count is a power of two, so that they are exact.
  explicit TrainedPool(Rng &rng);
  // Raises std::runtime_error where a result differs from the truth on any of these numbers of threads.
  void check(const Tier &tier, const std::vector<int> &threads) const;

private:
  void make_truth();

  TrainPoolOp forward_{}, backward_{};
  std::unique_ptr<Guarded> x_, grad_, y_, taps_, dx_; // what is read, and the truth of what is written
  bool at_end_;
};

} // namespace native_driver
