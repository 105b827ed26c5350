// A convolution of training together with its truth, on small integers between guards.
#pragma once

#include "scene.h"

#include "train_conv.h"

namespace native_driver {

class TrainedConv {
public:
  // Any size, padding, pitch and order of the weights, turned round or not: direct sums of bfloat16 at any stride, else
  // a tile of Winograd's algorithm.
  TrainedConv(Rng &rng, bool tiles);
  // Raises std::runtime_error where the result differs from the truth on any of these numbers of threads.
  void check(const Tier &tier, const std::vector<int> &threads) const;

private:
  TrainConvOp op_{};
  std::unique_ptr<Guarded> x_, weight_, truth_;
  bool at_end_;
};

} // namespace native_driver
