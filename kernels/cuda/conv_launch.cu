// The part of the C interface that talks to the device.
#include <cstddef>
#include <cstring>
#include <cuda_runtime.h>
#include <stdexcept>

#include "conv_plan.h"
#include "conv_table.cuh"
#include "encode.h"
#include "errors.h"

using namespace inception_fast::hopper;

namespace {

constexpr uint32_t MAGIC = 0x68636f6e; // what a blob begins with

struct Head {
  uint32_t magic;
  int32_t device, blocks, shared_bytes, cluster, overlap;
  uint64_t kernel; // of this process
};

struct Blob {
  Head head;
  Group group;
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

bool is_hopper(int device) {
  return attribute(cudaDevAttrComputeCapabilityMajor, device) == 9 &&
         attribute(cudaDevAttrComputeCapabilityMinor, device) == 0;
}

const void *kernel_of(const HopperConfig &config, int type) {
  int index = 0;
  while (TILE_COLUMNS[index] != config.columns)
    ++index;
  if (type == HOPPER_BFLOAT16)
    return config.turns ? conv_kernel<__nv_bfloat16, true>(index) : conv_kernel<__nv_bfloat16, false>(index);
  return config.turns ? conv_kernel<__half, true>(index) : conv_kernel<__half, false>(index);
}

Blob prepare(const HopperConv *convs, int count, int type, const HopperConfig &config, uint64_t workspace, int blocks,
             int overlap) {
  Blob blob{};
  check(cudaGetDevice(&blob.head.device), "cudaGetDevice");
  const int device = blob.head.device;
  if (!is_hopper(device))
    throw std::runtime_error("device " + std::to_string(device) +
                             " is not of compute capability 9.0, the only one allowed");
  const Element element = type == HOPPER_BFLOAT16 ? Element::bfloat16 : Element::float16;
  for (int i = 0; i < count; ++i) {
    blob.group.x[i] = encode(x_map(convs[i], element, config));
    blob.group.weights[i] = encode(weight_map(convs[i], element, config));
  }
  const int64_t units = fill_problems(convs, count, config, workspace, blob.group.problem);
  blob.group.units = static_cast<int32_t>(units);
  blob.group.cluster = config.cluster;
  blob.group.stages = config.stages;
  blob.group.depth = config.depth;
  const int most = blocks > 0 ? blocks : attribute(cudaDevAttrMultiProcessorCount, device);
  const int clusters = most / config.cluster > 0 ? most / config.cluster : 1;
  const void *kernel = kernel_of(config, type);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.shared_bytes),
        "cudaFuncSetAttribute");
  blob.head.magic = MAGIC;
  blob.head.blocks = static_cast<int32_t>(units < clusters ? units : clusters) * config.cluster;
  blob.head.shared_bytes = config.shared_bytes;
  blob.head.cluster = config.cluster;
  blob.head.overlap = overlap;
  blob.head.kernel = reinterpret_cast<uint64_t>(kernel);
  return blob;
}

void launch(const void *bytes, uint64_t stream) {
  Head head;
  std::memcpy(&head, bytes, sizeof head); // a blob need not be aligned
  if (head.magic != MAGIC)
    throw std::invalid_argument("bytes that are no blob; allowed: what hopper_conv_prepare wrote");
  int device = -1;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device != head.device)
    throw std::invalid_argument("current device " + std::to_string(device) + "; allowed: the blob's, " +
                                std::to_string(head.device));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(head.blocks);
  config.blockDim = dim3(THREADS);
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

int32_t hopper_devices(void) {
  return guarded(-1, [] {
    int count = 0, fit = 0;
    check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    for (int device = 0; device < count; ++device)
      fit += is_hopper(device);
    return fit;
  });
}

int64_t hopper_conv_blob_bytes(void) { return sizeof(Blob); }

int32_t hopper_conv_prepare(const HopperConv *convs, int32_t count, int32_t type, int32_t config, uint64_t workspace,
                            int32_t blocks, int32_t overlap, void *blob) {
  return guarded(1, [&] {
    const std::vector<std::string> reasons = conv_reasons(convs, count, type, config);
    if (!reasons.empty())
      return fail_with(reasons.front());
    const HopperConfig chosen = conv_configs()[config];
    if (workspace % 256 != 0 || (workspace == 0 && workspace_of(convs, count, chosen).bytes > 0))
      return fail_with("workspace at " + std::to_string(workspace) + "; allowed: multiples of 256, not 0 for split K");
    const Blob made = prepare(convs, count, type, chosen, workspace, blocks, overlap);
    std::memcpy(blob, &made, sizeof made);
    return 0;
  });
}

int32_t hopper_conv_launch(const void *blob, uint64_t stream) {
  return guarded(1, [&] {
    launch(blob, stream);
    return 0;
  });
}
}
