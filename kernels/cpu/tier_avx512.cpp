// Every kernel, compiled for AVX-512 F.
#include "simd_avx512.h"

#include "conv.h"
#include "pointwise.h"
#include "pool.h"

namespace inception_fast::cpu {

extern const Tier avx512_tier = {
    "avx512", Isa::lanes, Isa::rows, conv_scratch, conv, pool, eltwise, import, lrn, normalize,
};

} // namespace inception_fast::cpu
