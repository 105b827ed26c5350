// Plain data of a weight gradient by Winograd's tiles, for the kernels of every tier. No inline code: see spec.h.
#pragma once

#include "weight_gradient_op.h"

namespace inception_fast::cpu {

// What the caller asks for, by the tile `of.tile_h` x `of.tile_w`, and where its parts lie. `apart` of a part: floats
// from point to point, an odd number of lines.
struct GradientTilesOp {
  WeightGradientOp of; // its rows are those of the products; at stride 1
  int32_t points, vectors, chunks;
  int64_t first;      // the first tile of the chunk, with which its sums begin
  int64_t begin, end; // the block's tiles
  int64_t depth;      // tiles of the largest block
  float *x, *grad;    // [point][panel of two vectors][depth][channels], [point][tile of rows][depth][rows]
  float *sums;        // [point][oc][vectors of c], of each chunk
  const float *zeros; // a pixel of x and one of grad
  int64_t x_apart, grad_apart, sums_apart;
};

struct GradientTilesTier {
  int most_rows, least_rows, lanes;
  void (*transform)(const GradientTilesOp &, const Worker &); // the block's tiles of x and of grad
  void (*multiply)(const GradientTilesOp &, const Worker &);  // adds the block's products to the sums
  void (*finish)(const GradientTilesOp &, const Worker &);    // dw of all chunks' sums
};

extern const GradientTilesTier generic_gradient_tiles;
#ifdef INCEPTION_FAST_X86
extern const GradientTilesTier avx2_gradient_tiles;
extern const GradientTilesTier avx512_gradient_tiles;
#endif

// As weight_gradient, of a checked operator that names a tile.
void winograd_gradient(const Tier &tier, const WeightGradientOp &op, int threads);

} // namespace inception_fast::cpu
