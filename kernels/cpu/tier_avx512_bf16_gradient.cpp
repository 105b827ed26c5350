// Gradients of weights, compiled for AVX-512 with BF16. Those by Winograd's tiles are AVX-512's.
#include "simd_avx512_bf16.h"

namespace inception_fast::cpu {
namespace {
using Isa = Avx512Bf16;
}
} // namespace inception_fast::cpu

#include "weight_gradient.h"

namespace inception_fast::cpu {

extern const WeightGradientTier avx512_bf16_weight_gradient = {Isa::rows, LEAST_ROWS,    WIDE,
                                                               Isa::dots, pack_gradient, multiply_gradient};

} // namespace inception_fast::cpu
