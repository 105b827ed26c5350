// A convolution in training at stride 1, float32, by winograd.h's tiles, its weights transformed anew in each call.
//
// Forward, and the gradient of x, which is the same convolution of the gradient of y by the kernel turned round with
// its two kinds of channels exchanged: the weights' strides say so. No inline code: see spec.h.
#pragma once

#include "spec.h"

namespace inception_fast::cpu {

// y[n, oh, ow, oc] = conv(x[n, h, w, c], w), pixels of x and y `pitch` floats apart.
struct TrainConvOp {
  int32_t n, h, w, c, oc, kh, kw, top, left, oh, ow;
  int32_t tile_h, tile_w;  // one of winograd_tiles()
  const float *x, *weight; // weight: of output channel 0, channel 0 and tap (0, 0)
  float *y;
  int64_t x_pitch, y_pitch;
  int64_t column, channel, row, tap; // floats between output channels, channels, rows of taps, taps; may be negative
};

// Transforms channels [low, high) of a panel's weights: `to` is [p][c][columns].
struct TrainWeightsTier {
  void (*pack)(const TrainConvOp &, const Panel &, int32_t low, int32_t high, float *to);
};

extern const TrainWeightsTier generic_train_weights;
#ifdef INCEPTION_FAST_X86
extern const TrainWeightsTier avx2_train_weights;
extern const TrainWeightsTier avx512_train_weights;
#endif

// Writes all of y; the same bits for any number of threads. Raises std::invalid_argument before anything is written.
void train_conv(const Tier &tier, const TrainConvOp &op, int threads);

} // namespace inception_fast::cpu
