// Every kernel but Winograd's tiles and gradients of weights, compiled for AVX2 and FMA.
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

namespace inception_fast::cpu {

extern const Tier avx2_tier = {
    "avx2",    Isa::lanes, Isa::rows, IMPORT_PIXELS, 1,      conv_scratch, conv,      &avx2_winograd, depthwise_scratch,
    depthwise, pair<conv>, pool,      eltwise,       import, lrn,          normalize, peak,
};

extern const BatchNormTier avx2_batch_norm = {statistics, apply, gradient_sums, gradient};
extern const TrainPairsTier avx2_train_pairs = {pack_pairs};
extern const TrainPoolTier avx2_train_pool = {train_pool_forward, train_pool_gradient};

} // namespace inception_fast::cpu
