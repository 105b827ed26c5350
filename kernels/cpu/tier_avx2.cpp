// Every kernel, compiled for AVX2 and FMA.
#include "simd_avx2.h"

#include "batch_norm.h"
#include "conv.h"
#include "depthwise.h"
#include "pair.h"
#include "peak.h"
#include "pointwise.h"
#include "pool.h"
#include "train_pairs.h"
#include "train_pool.h"
#include "train_weights.h"
#include "weight_gradient.h"
#include "winograd.h"
#include "winograd_gradient.h"

namespace inception_fast::cpu {

extern const Tier avx2_tier = {
    "avx2",           Isa::lanes, Isa::rows,         IMPORT_PIXELS, 1,          conv_scratch, conv,
    winograd_scratch, winograd,   depthwise_scratch, depthwise,     pair<conv>, pool,         eltwise,
    import,           lrn,        normalize,         peak,
};

extern const BatchNormTier avx2_batch_norm = {statistics, apply, gradient_sums, gradient};
extern const TrainPairsTier avx2_train_pairs = {pack_pairs};
extern const TrainPoolTier avx2_train_pool = {train_pool_forward, train_pool_gradient};
extern const TrainWeightsTier avx2_train_weights = {pack_weights};
extern const GradientTilesTier avx2_gradient_tiles = {Isa::rows,       LEAST_ROWS,      Isa::lanes,
                                                      transform_tiles, multiply_points, finish_taps};
extern const WeightGradientTier avx2_weight_gradient = {Isa::rows, LEAST_ROWS,    WIDE,
                                                        Isa::dots, pack_gradient, multiply_gradient};

} // namespace inception_fast::cpu
