// Every kernel, compiled for AVX-512 with BF16.
#include "simd_avx512_bf16.h"

namespace inception_fast::cpu {
namespace {
using Isa = Avx512Bf16;
}
} // namespace inception_fast::cpu

#include "batch_norm.h"
#include "conv.h"
#include "pair.h"
#include "peak.h"
#include "pointwise.h"
#include "pool.h"
#include "train_pairs.h"
#include "train_pool.h"
#include "weight_gradient.h"

namespace inception_fast::cpu {

extern const Tier avx512_bf16_tier = {
    "avx512_bf16",   Isa::lanes, Isa::rows, IMPORT_PIXELS, 1,      conv_scratch, conv,      avx512_winograd_scratch,
    avx512_winograd, pair<conv>, pool,      eltwise,       import, lrn,          normalize, peak,
};

extern const BatchNormTier avx512_bf16_batch_norm = {statistics, apply, gradient_sums, gradient};
extern const TrainPairsTier avx512_bf16_train_pairs = {pack_pairs};
extern const TrainPoolTier avx512_bf16_train_pool = {train_pool_forward, train_pool_gradient};
extern const WeightGradientTier avx512_bf16_weight_gradient = {Isa::rows, LEAST_ROWS,    WIDE,
                                                               Isa::dots, pack_gradient, multiply_gradient};

} // namespace inception_fast::cpu
