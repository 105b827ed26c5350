// Every kernel but Winograd's tiles and gradients of weights, compiled for the baseline of the target.
#include "simd_generic.h"

namespace inception_fast::cpu {
namespace {
using Isa = Generic<4>;
}
} // namespace inception_fast::cpu

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

extern const Tier generic_tier = {
    "generic",
    Isa::lanes,
    Isa::rows,
    IMPORT_PIXELS,
    1,
    conv_scratch,
    conv,
    &generic_winograd,
    depthwise_scratch,
    depthwise,
    pair<conv>,
    pool,
    eltwise,
    import,
    lrn,
    normalize,
    peak,
};

extern const BatchNormTier generic_batch_norm = {statistics, apply, gradient_sums, gradient};
extern const TrainPairsTier generic_train_pairs = {pack_pairs};
extern const TrainPoolTier generic_train_pool = {train_pool_forward, train_pool_gradient};

} // namespace inception_fast::cpu
