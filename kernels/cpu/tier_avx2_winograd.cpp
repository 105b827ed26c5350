// Convolutions by Winograd's tiles, and their weights in training, compiled for AVX2 and FMA.
#include "simd_avx2.h"

#include "train_weights.h"
#include "winograd.h"

namespace inception_fast::cpu {

extern const WinogradTier avx2_winograd = {winograd_scratch, winograd};
extern const TrainWeightsTier avx2_train_weights = {pack_weights};

} // namespace inception_fast::cpu
