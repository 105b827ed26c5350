// A convolution in training, its weights packed anew in each call: by winograd.h's tiles at stride 1, of bfloat16 maps
// also by conv.h's direct sums.
//
// Forward, and the gradient of x at stride 1, which is the same convolution of the gradient of y by the kernel turned
// round with its two kinds of channels exchanged: the weights' strides say so. The weights are float, and rounded to
// bfloat16 while they are packed for a direct sum. A tap on padding adds nothing, whatever its weight. No inline code:
// see spec.h.
#pragma once

#include "spec.h"

namespace inception_fast::cpu {

// y[n, oh, ow, oc] = conv(x[n, h, w, c], w), pixels of x and y `pitch` elements of `type` apart.
struct TrainConvOp {
  Type type;
  int32_t n, h, w, c, oc, kh, kw, stride_h, stride_w, top, left, oh, ow;
  int32_t tile_h, tile_w; // one of winograd_tiles(), or of bfloat16 0
  const void *x;
  const float *weight; // of output channel 0, channel 0 and tap (0, 0)
  void *y;
  int64_t x_pitch, y_pitch;
  int64_t column, channel, row, tap; // floats between output channels, channels, rows of taps, taps; may be negative
};

constexpr int32_t SHARE = 64; // channels of a panel that a thread packs at a time

// Transforms channels [low, high) of a panel's weights: `to` is [p][c][columns].
struct TrainWeightsTier {
  void (*pack)(const TrainConvOp &, const Panel &, int32_t low, int32_t high, float *to);
};

// Rounds channels [low, high) of a panel's weights, a share of them, `low` even; `to` is the panel's, in the order of
// ConvOp's weights.
struct TrainPairsTier {
  void (*pack)(const TrainConvOp &, const ConvOp &, const Panel &, int32_t low, int32_t high, bf16 *to);
};

extern const TrainWeightsTier generic_train_weights;
extern const TrainPairsTier generic_train_pairs;
extern const TrainPairsTier amx_emulated_train_pairs;
#ifdef INCEPTION_FAST_X86
extern const TrainWeightsTier avx2_train_weights;
extern const TrainWeightsTier avx512_train_weights;
extern const TrainPairsTier avx2_train_pairs;
extern const TrainPairsTier avx512_train_pairs;
extern const TrainPairsTier avx512_bf16_train_pairs;
#endif

// Writes all of y; the same bits for any number of threads. Raises std::invalid_argument before anything is written.
void train_conv(const Tier &tier, const TrainConvOp &op, int threads);

} // namespace inception_fast::cpu
