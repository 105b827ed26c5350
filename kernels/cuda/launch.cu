#include <cstring>
#include <cuda_runtime.h>
#include <mutex>
#include <stdexcept>
#include <string>

#include "errors.h"
#include "launch.h"
#include "marks.cuh"

namespace inception_fast::hopper {

namespace {

void check(cudaError_t error, const char *what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

bool fits(int device) {
  return attribute(cudaDevAttrComputeCapabilityMajor, device) == 9 &&
         attribute(cudaDevAttrComputeCapabilityMinor, device) == 0;
}

} // namespace

int fitting_devices() {
  int count = 0, fit = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  for (int device = 0; device < count; ++device)
    fit += fits(device);
  return fit;
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (!fits(device))
    throw std::runtime_error("device " + std::to_string(device) +
                             " is not of compute capability 9.0, the only one allowed");
  return device;
}

int most_blocks(int blocks, int device) {
  return blocks > 0 ? blocks : attribute(cudaDevAttrMultiProcessorCount, device);
}

void allow_shared(const void *kernel, int bytes) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  cudaFuncAttributes now{};
  check(cudaFuncGetAttributes(&now, kernel), "cudaFuncGetAttributes");
  if (bytes > now.maxDynamicSharedSizeBytes)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
}

void launch_blob(const void *bytes, uint32_t magic, const char *maker, int64_t parameters, uint64_t stream) {
  LaunchHead head;
  std::memcpy(&head, bytes, sizeof head);
  if (head.magic != magic)
    throw std::invalid_argument(std::string("bytes that are no blob; allowed: what ") + maker + " wrote");
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
  cudaLaunchAttribute attributes[3]{};
  if (head.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(head.cluster), 1, 1};
  }
  if (head.overlap) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (head.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  config.attrs = attributes;
  void *arguments[] = {const_cast<uint8_t *>(static_cast<const uint8_t *>(bytes) + parameters)};
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void *>(head.kernel), arguments), "launch");
}

} // namespace inception_fast::hopper

#ifdef INCEPTION_FAST_MARKS
using namespace inception_fast::hopper;

std::vector<const void *> &inception_fast::hopper::all_marks() {
  static std::vector<const void *> all;
  return all;
}

// Copies the marks of the last convolution to `to`, [MARKED_THREADS][MARKS], and forgets them; with 0 it only forgets.
extern "C" __attribute__((visibility("default"))) int32_t hopper_marks(void *to) {
  return guarded(1, [&] {
    for (const void *symbol : all_marks()) {
      static PassedAt found[MARKED_THREADS][MARKS];
      void *there = nullptr;
      check(cudaGetSymbolAddress(&there, symbol), "cudaGetSymbolAddress");
      check(cudaMemcpy(found, there, sizeof found, cudaMemcpyDeviceToHost), "cudaMemcpy");
      check(cudaMemset(there, 0, sizeof found), "cudaMemset");
      if (to && found[0][0].kind)
        std::memcpy(to, found, sizeof found);
    }
    return 0;
  });
}
#endif
