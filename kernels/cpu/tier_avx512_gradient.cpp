// Gradients of weights, compiled for AVX-512 F.
#include "simd_avx512.h"

namespace inception_fast::cpu {
namespace {
using Isa = Avx512;
}
} // namespace inception_fast::cpu

#include "weight_gradient.h"
#include "winograd_gradient.h"

namespace inception_fast::cpu {

extern const GradientTilesTier avx512_gradient_tiles = {Isa::rows,       LEAST_ROWS,      Isa::lanes,
                                                        transform_tiles, multiply_points, finish_taps};
extern const WeightGradientTier avx512_weight_gradient = {Isa::rows, LEAST_ROWS,    WIDE,
                                                          Isa::dots, pack_gradient, multiply_gradient};

} // namespace inception_fast::cpu
