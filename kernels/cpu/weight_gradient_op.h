// Plain data of a convolution's weight gradient, for the kernels of every tier. No inline code: see spec.h.
#pragma once

#include "spec.h"

namespace inception_fast::cpu {

// dw[oc][kh][kw][c] = sum over images and pixels (oy, ox) of
//                     grad[n][oy][ox][oc] * x[n][oy * stride_h - top + kh][ox * stride_w - left + kw][c]
//
// x is [n, h, w, c], its pixels `x_pitch` elements apart, grad [n, oh, ow, oc] likewise, both of `type`; dw is float.
struct WeightGradientOp {
  Type type;
  int32_t n, h, w, c, oc, kh, kw, stride_h, stride_w, top, left, oh, ow;
  int64_t x_pitch, grad_pitch;
  const void *x, *grad;
  float *dw;
  int32_t tile_h, tile_w; // one of winograd_tiles(), else 0: winograd_gradient_op.h
  int32_t rows;           // output channels of a tile
  int64_t begin, end;     // the pixels that dw is summed over
  int64_t depth;          // pixels of a stretch: what is multiplied between two additions to dw
  int64_t units;          // steps of a stretch: pixels, or pairs of them where the tier multiplies pairs
  float *packed;          // [tiles][units][rows], of all workers: the stretch's gradient
  float *columns;         // [workers][units][two vectors]: the stretch's pixels of x, shifted by a tap
  int32_t *steps;         // [workers][units]: the steps of a tap with a pixel on the map, in floats of a packed tile
  const void **places;    // [workers][depth + 1]: the pixel of x for a tap, or `zeros` outside of the map
  const void *zeros;      // a pixel
};

struct WeightGradientTier {
  int most_rows, least_rows, columns;
  bool pairs;
  void (*pack)(const WeightGradientOp &, int64_t first, const Worker &);
  void (*multiply)(const WeightGradientOp &, int64_t first, const Worker &);
};

extern const WeightGradientTier generic_weight_gradient;
#ifdef INCEPTION_FAST_X86
extern const WeightGradientTier avx2_weight_gradient;
extern const WeightGradientTier avx512_weight_gradient;
extern const WeightGradientTier avx512_bf16_weight_gradient;
#endif

// All but rows and what follows is the caller's. Writes all of dw, in the same order of sums for any number of threads.
void weight_gradient(const Tier &tier, const WeightGradientOp &op, int threads);

// The height of a tile that covers `oc` with the fewest rows, the larger of two.
int32_t rows_for(int most, int least, int32_t oc);

// Memory that the thread keeps for its next calls: asked of the system each time, its pages would be new each time.
char *gradient_scratch(int64_t bytes);

} // namespace inception_fast::cpu
