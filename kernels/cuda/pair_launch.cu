// The part of the fused pair's C interface that talks to the device.
#include <cstddef>
#include <cstring>
#include <cuda_runtime.h>
#include <stdexcept>

#include "encode.h"
#include "errors.h"
#include "pair.cuh"
#include "pair_plan.h"

using namespace inception_fast::hopper;

namespace {

constexpr uint32_t MAGIC = 0x68706169; // what a blob begins with

struct Head {
  uint32_t magic;
  int32_t device, blocks, threads, shared_bytes, cluster, overlap;
  uint64_t kernel; // of this process
};

struct Blob {
  Head head;
  PairGroup group;
};

void check(cudaError_t error, const char *what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

const void *kernel_of(const HopperPairConfig &config, int type) {
  if (type == HOPPER_BFLOAT16)
    return config.groups == 3 ? reinterpret_cast<const void *>(&pair<PAIR_TAPS, 3, __nv_bfloat16>)
                              : reinterpret_cast<const void *>(&pair<PAIR_TAPS, 4, __nv_bfloat16>);
  return config.groups == 3 ? reinterpret_cast<const void *>(&pair<PAIR_TAPS, 3, __half>)
                            : reinterpret_cast<const void *>(&pair<PAIR_TAPS, 4, __half>);
}

Blob prepare(const HopperPair &pair, int type, const HopperPairConfig &config, int blocks, int overlap) {
  Blob blob{};
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (attribute(cudaDevAttrComputeCapabilityMajor, device) != 9 ||
      attribute(cudaDevAttrComputeCapabilityMinor, device) != 0)
    throw std::runtime_error("device " + std::to_string(device) +
                             " is not of compute capability 9.0, the only one allowed");
  const Element element = type == HOPPER_BFLOAT16 ? Element::bfloat16 : Element::float16;
  blob.group.x = encode(pair_x_map(pair, element));
  blob.group.w1 = encode(pair_weight_map(pair.w1, pair.taps, pair.mid, pair.c, element, config));
  blob.group.w2 = encode(pair_weight_map(pair.w2, pair.taps, pair.oc, pair.mid, element, config));
  fill_pair(blob.group, pair, config);
  const void *kernel = kernel_of(config, type);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.shared_bytes),
        "cudaFuncSetAttribute");
  const int most = blocks > 0 ? blocks : attribute(cudaDevAttrMultiProcessorCount, device);
  blob.head = {
      MAGIC,          device,  pair_blocks(pair, config, most),   pair_threads(config.groups), config.shared_bytes,
      config.cluster, overlap, reinterpret_cast<uint64_t>(kernel)};
  return blob;
}

void launch(const void *bytes, uint64_t stream) {
  Head head;
  std::memcpy(&head, bytes, sizeof head); // a blob need not be aligned
  if (head.magic != MAGIC)
    throw std::invalid_argument("bytes that are no blob; allowed: what hopper_pair_prepare wrote");
  int device = -1;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device != head.device)
    throw std::invalid_argument("current device " + std::to_string(device) + "; allowed: the blob's, " +
                                std::to_string(head.device));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(head.blocks);
  config.blockDim = dim3(head.threads);
  config.dynamicSmemBytes = head.shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2]{};
  if (head.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(head.cluster), 1, 1};
  }
  if (head.overlap) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  config.attrs = attributes;
  void *arguments[] = {const_cast<uint8_t *>(static_cast<const uint8_t *>(bytes) + offsetof(Blob, group))};
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void *>(head.kernel), arguments), "launch");
}

} // namespace

extern "C" {

int64_t hopper_pair_blob_bytes(void) { return sizeof(Blob); }

int32_t hopper_pair_prepare(const HopperPair *pair, int32_t type, int32_t config, int32_t blocks, int32_t overlap,
                            void *blob) {
  return guarded(1, [&] {
    const std::vector<std::string> reasons = pair_reasons(*pair, type, config);
    if (!reasons.empty())
      return fail_with(reasons.front());
    const Blob made = prepare(*pair, type, pair_configs()[config], blocks, overlap);
    std::memcpy(blob, &made, sizeof made);
    return 0;
  });
}

int32_t hopper_pair_launch(const void *blob, uint64_t stream) {
  return guarded(1, [&] {
    launch(blob, stream);
    return 0;
  });
}
}
