// Every kernel but Winograd's tiles and gradients of weights, compiled for AVX-512 F.
#include "simd_avx512.h"

namespace inception_fast::cpu {
namespace {
using Isa = Avx512;
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

extern const Tier avx512_tier = {
    "avx512",
    Isa::lanes,
    Isa::rows,
    IMPORT_PIXELS,
    1,
    conv_scratch,
    conv,
    &avx512_winograd,
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

extern const BatchNormTier avx512_batch_norm = {statistics, apply, gradient_sums, gradient};
extern const TrainPairsTier avx512_train_pairs = {pack_pairs};
extern const TrainPoolTier avx512_train_pool = {train_pool_forward, train_pool_gradient};

} // namespace inception_fast::cpu
