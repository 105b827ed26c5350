// An optimizer's update of many parameters in one pass over memory.
#pragma once

#include <cstdint>
#include <vector>

namespace inception_fast::cpu {

// `length` floats each.
struct RmspropPart {
  float *p;
  const float *grad;
  float *square, *momentum;
  int64_t length;
};

struct RmspropRates {
  double lr, decay, momentum, epsilon, weight_decay;
};

// TensorFlow's RMSProp: g = grad + weight_decay p;  square = decay square + (1 - decay) g^2;
// momentum = momentum_rate momentum + lr g / sqrt(square + epsilon);  p -= momentum. In float.
void rmsprop(const std::vector<RmspropPart> &parts, const RmspropRates &rates, int threads);

} // namespace inception_fast::cpu
