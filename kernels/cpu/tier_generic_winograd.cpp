// Convolutions by Winograd's tiles, and their weights in training, compiled for the baseline of the target.
#include "simd_generic.h"

namespace inception_fast::cpu {
namespace {
using Isa = Generic<4>;
}
} // namespace inception_fast::cpu

#include "train_weights.h"
#include "winograd.h"

namespace inception_fast::cpu {

extern const WinogradTier generic_winograd = {winograd_scratch, winograd};
extern const TrainWeightsTier generic_train_weights = {pack_weights};

} // namespace inception_fast::cpu
