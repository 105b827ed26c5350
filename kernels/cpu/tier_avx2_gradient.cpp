// Gradients of weights, compiled for AVX2 and FMA.
#include "simd_avx2.h"

#include "weight_gradient.h"
#include "winograd_gradient.h"

namespace inception_fast::cpu {

extern const GradientTilesTier avx2_gradient_tiles = {Isa::rows,       LEAST_ROWS,      Isa::lanes,
                                                      transform_tiles, multiply_points, finish_taps};
extern const WeightGradientTier avx2_weight_gradient = {Isa::rows, LEAST_ROWS,    WIDE,
                                                        Isa::dots, pack_gradient, multiply_gradient};

} // namespace inception_fast::cpu
