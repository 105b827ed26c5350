// Every kernel, compiled for AVX-512 with BF16, but for what reads float32 alone: that is AVX-512's.
#include "simd_avx512_bf16.h"

namespace inception_fast::cpu {
namespace {
using Isa = Avx512Bf16;
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
namespace {

void conv_of_either(const ConvOp &op, const Call &call, const Worker &worker) {
  op.x.type == Type::bfloat16 ? conv_of<bf16>(op, call, worker) : avx512_tier.conv(op, call, worker);
}

void depthwise_of_either(const ConvOp &op, const Call &call, const Worker &worker) {
  op.x.type == Type::bfloat16 ? depthwise_of<bf16>(op, call, worker) : avx512_tier.depthwise(op, call, worker);
}

} // namespace

extern const Tier avx512_bf16_tier = {
    "avx512_bf16",
    Isa::lanes,
    Isa::rows,
    IMPORT_PIXELS,
    1,
    conv_scratch,
    conv_of_either,
    &avx512_winograd,
    depthwise_scratch,
    depthwise_of_either,
    pair<conv_of_either>,
    pool,
    eltwise,
    import,
    lrn,
    normalize,
    peak,
};

extern const BatchNormTier avx512_bf16_batch_norm = {statistics, apply, gradient_sums, gradient};
extern const TrainPairsTier avx512_bf16_train_pairs = {pack_pairs};
extern const TrainPoolTier avx512_bf16_train_pool = {train_pool_forward, train_pool_gradient};

} // namespace inception_fast::cpu
