// Convolutions by Winograd's tiles, and their weights in training, compiled for AVX-512 F.
#include "simd_avx512.h"

namespace inception_fast::cpu {
namespace {
using Isa = Avx512;
}
} // namespace inception_fast::cpu

#include "train_weights.h"
#include "winograd.h"

namespace inception_fast::cpu {

extern const WinogradTier avx512_winograd = {winograd_scratch, winograd};
extern const TrainWeightsTier avx512_train_weights = {pack_weights};

} // namespace inception_fast::cpu
