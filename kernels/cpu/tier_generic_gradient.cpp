// Gradients of weights, compiled for the baseline of the target.
#include "simd_generic.h"

namespace inception_fast::cpu {
namespace {
using Isa = Generic<4>;
}
} // namespace inception_fast::cpu

#include "weight_gradient.h"
#include "winograd_gradient.h"

namespace inception_fast::cpu {

extern const GradientTilesTier generic_gradient_tiles = {Isa::rows,       LEAST_ROWS,      Isa::lanes,
                                                         transform_tiles, multiply_points, finish_taps};
extern const WeightGradientTier generic_weight_gradient = {Isa::rows, LEAST_ROWS,    WIDE,
                                                           Isa::dots, pack_gradient, multiply_gradient};

} // namespace inception_fast::cpu
