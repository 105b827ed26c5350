// Plain data of batch norm in training, for the kernels of every tier. No inline code: see spec.h.
#pragma once

#include "spec.h"

namespace inception_fast::cpu {

// y = relu(scale * (x - mean) + bias), scale = weight / sqrt(var + eps), mean and var those of x over its pixels.
//
// x, y and the gradients are [pixels, c] of `type`, a gradient's pixels `grad_pitch` elements apart; all else is float.
// Sums are taken over blocks of `block` pixels, whatever the number of threads.
//
// Where `running_mean` is not null the forward moves it and running_var by `share` of the way to the mean and the
// unbiased variance, in double, rounded once, and counts the batch.
struct BatchNormOp {
  Type type;
  int64_t pixels, block, blocks, grad_pitch;
  int32_t c;
  const void *x, *grad;
  void *y; // forward y, backward the gradient of x
  const float *weight, *bias;
  float *mean, *var; // written forward, read backward
  double eps;
  float *running_mean, *running_var;
  int64_t *batches;
  double share;
  float *grad_weight, *grad_bias;
  float *partial; // [blocks][2][c]: mean and summed squares of deviations; backward the sums of g and of g (x - mean)
  float *scale;   // [c]
  float *slope, *offset; // [c], backward: the gradient of x is scale g + slope (x - mean) + offset
};

// Each treats the blocks that fall to a worker; the sums of all blocks are combined between the two of a direction.
struct BatchNormTier {
  void (*statistics)(const BatchNormOp &, const Worker &);
  void (*apply)(const BatchNormOp &, const Worker &);
  void (*gradient_sums)(const BatchNormOp &, const Worker &);
  void (*gradient)(const BatchNormOp &, const Worker &);
};

extern const BatchNormTier generic_batch_norm;
#ifdef INCEPTION_FAST_X86
extern const BatchNormTier avx2_batch_norm;
extern const BatchNormTier avx512_batch_norm;
extern const BatchNormTier avx512_bf16_batch_norm;
#endif

// All pointers of `op` but partial, scale, slope and offset are the caller's; block and blocks are chosen here. The
// forward writes y, mean and var, and moves the running ones; the backward y (the gradient of x), grad_weight and
// grad_bias.
void batch_norm_relu(const Tier &tier, const BatchNormOp &op, int threads);
void batch_norm_relu_backward(const Tier &tier, const BatchNormOp &op, int threads);

} // namespace inception_fast::cpu
