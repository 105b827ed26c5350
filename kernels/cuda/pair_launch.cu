// The part of the fused pair's C interface that talks to the device.
#include <cstddef>
#include <cstring>

#include "encode.h"
#include "errors.h"
#include "launch.h"
#include "pair.cuh"
#include "pair_plan.h"

using namespace inception_fast::hopper;

namespace {

constexpr uint32_t MAGIC = 0x68706169; // what a blob begins with

using PairBlob = Blob<PairGroup>;

const void *kernel_of(const HopperPairConfig &config, int type) {
  if (type == HOPPER_BFLOAT16)
    return config.groups == 3 ? reinterpret_cast<const void *>(&pair<PAIR_TAPS, 3, __nv_bfloat16>)
                              : reinterpret_cast<const void *>(&pair<PAIR_TAPS, 4, __nv_bfloat16>);
  return config.groups == 3 ? reinterpret_cast<const void *>(&pair<PAIR_TAPS, 3, __half>)
                            : reinterpret_cast<const void *>(&pair<PAIR_TAPS, 4, __half>);
}

PairBlob prepare(const HopperPair &pair, int type, const HopperPairConfig &config, int blocks, int overlap) {
  const int device = current_device();
  const Element element = element_named(type);
  PairBlob blob{};
  blob.group.x = encode(pair_x_map(pair, element));
  blob.group.w1 = encode(pair_weight_map(pair.w1, pair.taps, pair.mid, pair.c, element, config));
  blob.group.w2 = encode(pair_weight_map(pair.w2, pair.taps, pair.oc, pair.mid, element, config));
  fill_pair(blob.group, pair, config);
  const void *kernel = kernel_of(config, type);
  allow_shared(kernel, config.shared_bytes);
  blob.head = {MAGIC,
               device,
               pair_blocks(pair, config, most_blocks(blocks, device)),
               pair_threads(config.groups),
               config.shared_bytes,
               config.cluster,
               overlap,
               reinterpret_cast<uint64_t>(kernel)};
  return blob;
}

} // namespace

extern "C" {

int64_t hopper_pair_blob_bytes(void) { return sizeof(PairBlob); }

int32_t hopper_pair_prepare(const HopperPair *pair, int32_t type, int32_t config, int32_t blocks, int32_t overlap,
                            void *blob) {
  return guarded(1, [&] {
    const std::vector<std::string> reasons = pair_reasons(*pair, type, config);
    if (!reasons.empty())
      return fail_with(reasons.front());
    const PairBlob made = prepare(*pair, type, pair_configs()[config], blocks, overlap);
    std::memcpy(blob, &made, sizeof made);
    return 0;
  });
}

int32_t hopper_pair_launch(const void *blob, uint64_t stream) {
  return guarded(1, [&] {
    launch_blob(blob, MAGIC, "hopper_pair_prepare", offsetof(PairBlob, group), stream);
    return 0;
  });
}
}
