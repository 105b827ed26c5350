#include <cuda_runtime.h>
#include <stdexcept>
#include <string>

#include "encode.h"

namespace inception_fast::hopper {

namespace {

using EncodeTiled = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                 const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
using EncodeIm2col = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                  const cuuint64_t *, const int *, const int *, cuuint32_t, cuuint32_t,
                                  const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                  CUtensorMapFloatOOBfill);

void *entry_point(const char *name) {
  void *function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(name) + " of the driver: " + cudaGetErrorString(error));
  if (found != cudaDriverEntryPointSuccess || !function)
    throw std::runtime_error(std::string(name) + ": the driver has none; allowed: a driver for CUDA 12.0 or newer");
  return function;
}

CUtensorMapDataType type_of(Element element) {
  switch (element) {
  case Element::bfloat16:
    return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  case Element::float16:
    return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  default:
    return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  }
}

CUtensorMapSwizzle swizzle_of(Swizzle swizzle) {
  switch (swizzle) {
  case Swizzle::bytes128:
    return CU_TENSOR_MAP_SWIZZLE_128B;
  case Swizzle::bytes64:
    return CU_TENSOR_MAP_SWIZZLE_64B;
  case Swizzle::bytes32:
    return CU_TENSOR_MAP_SWIZZLE_32B;
  default:
    return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

std::string text(const MapSpec &spec) {
  std::string result = spec.im2col ? "im2col map of [" : "tiled map of [";
  for (int i = spec.rank - 1; i >= 0; --i)
    result += std::to_string(spec.size[i]) + (i ? ", " : "]");
  if (spec.im2col)
    return result + " from (" + std::to_string(spec.lower[0]) + ", " + std::to_string(spec.lower[1]) + ") to (" +
           std::to_string(spec.upper[0]) + ", " + std::to_string(spec.upper[1]) + "), " + std::to_string(spec.pixels) +
           " pixels of " + std::to_string(spec.channels);
  result += ", box [";
  for (int i = spec.rank - 1; i >= 0; --i)
    result += std::to_string(spec.box[i]) + (i ? ", " : "]");
  return result;
}

} // namespace

CUtensorMap encode(const MapSpec &spec) {
  static const auto tiled = reinterpret_cast<EncodeTiled>(entry_point("cuTensorMapEncodeTiled"));
  static const auto im2col = reinterpret_cast<EncodeIm2col>(entry_point("cuTensorMapEncodeIm2col"));
  CUtensorMap map;
  cuuint64_t size[5], stride[4];
  cuuint32_t box[5], step[5];
  for (int i = 0; i < 5; ++i) {
    size[i] = spec.size[i];
    box[i] = spec.box[i];
    step[i] = spec.step[i];
    if (i < 4)
      stride[i] = spec.stride[i];
  }
  void *base = reinterpret_cast<void *>(spec.base);
  const CUresult result =
      spec.im2col
          ? im2col(&map, type_of(spec.element), spec.rank, base, size, stride, spec.lower, spec.upper, spec.channels,
                   spec.pixels, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(spec.swizzle),
                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
          : tiled(&map, type_of(spec.element), spec.rank, base, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  swizzle_of(spec.swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("the driver refuses (CUresult " + std::to_string(result) + ") an " + text(spec));
  return map;
}

} // namespace inception_fast::hopper
