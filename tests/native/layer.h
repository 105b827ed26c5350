// One layer, called again and again: what a cache simulator looks at.
#pragma once

#include <string>

namespace native_driver {

// y [n, h, w, oc] = relu(conv(x [n, h, w, c])), stride 1, padded to the same size, dense NHWC in and out.
// kind "conv": one kh x kw. kind "pair": 1 x k to mid channels and k x 1, or the other way round with first_tall. kind
// "fused": such a pair as one operator.
struct Layer {
  std::string kind = "conv", tier = "avx2", type = "float32";
  int n = 1, h = 17, w = 17, c = 64, oc = 64, mid = 64, kh = 3, kw = 3, repeats = 1, threads = 1;
  bool first_tall = false;
};

// Runs it and returns a line of JSON: multiply-adds, bytes of maps and of packed weights, a sum of the outputs.
std::string run_layer(const Layer &layer);

} // namespace native_driver
