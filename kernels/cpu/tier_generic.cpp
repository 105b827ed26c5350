// Every kernel, compiled for the baseline of the target.
#include "simd_generic.h"

#include "conv.h"
#include "pointwise.h"
#include "pool.h"

namespace inception_fast::cpu {

extern const Tier generic_tier = {
    "generic", Isa::lanes, Isa::rows, IMPORT_PIXELS, conv_scratch, conv, pool, eltwise, import, lrn, normalize,
};

} // namespace inception_fast::cpu
