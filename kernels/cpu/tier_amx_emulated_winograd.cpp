// Convolutions by Winograd's tiles for the emulated tile unit, whose vectors are as long as AMX's tiers'.
#include "simd_generic.h"

namespace inception_fast::cpu {
namespace {
using Isa = Generic<16>;
}
} // namespace inception_fast::cpu

#include "winograd.h"

namespace inception_fast::cpu {

extern const WinogradTier amx_emulated_winograd = {winograd_scratch, winograd};

} // namespace inception_fast::cpu
