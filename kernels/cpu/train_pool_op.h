// Plain data of pools in training, for the kernels of every tier. No inline code: see spec.h.
#pragma once

#include "spec.h"

namespace inception_fast::cpu {

constexpr int32_t MOST_TAPS = 256; // of a window: a place in it is kept in a byte

// Forward: x [n, h, w, c] with pixels `pitch` elements apart, y [n, oh, ow, c] dense. Backward: x is the gradient of y,
// with pixels `pitch` apart, y that of x, dense. A window starts at stride * place - (top, left); padding is the same
// on all four sides, and windows may reach beyond it.
struct TrainPoolOp {
  Type type;
  bool maximum, count_include_pad;
  int32_t n, h, w, c, oh, ow, kh, kw, stride_h, stride_w, top, left;
  int64_t pitch;
  const void *x;
  void *y;
  unsigned char *taps; // [n, oh, ow, c], of a maximum: the place of the first largest value, kw * row + column
};

struct TrainPoolTier {
  void (*forward)(const TrainPoolOp &, const Worker &);
  void (*backward)(const TrainPoolOp &, const Worker &);
};

extern const TrainPoolTier generic_train_pool;
#ifdef INCEPTION_FAST_X86
extern const TrainPoolTier avx2_train_pool;
extern const TrainPoolTier avx512_train_pool;
extern const TrainPoolTier avx512_bf16_train_pool;
#endif

void train_pool(const Tier &tier, const TrainPoolOp &op, int threads);
void train_pool_backward(const Tier &tier, const TrainPoolOp &op, int threads);

} // namespace inception_fast::cpu
