// What a tensor map says, in plain numbers: built on the host by pure arithmetic, encoded by the driver for the GPU,
// and read as it is by the emulator. Sizes and strides are those of cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col.
#pragma once

#include <cstdint>

namespace inception_fast::hopper {

enum class Element : int32_t { bfloat16 = 0, float16 = 1, uint8 = 2 };

// The values are those of a matrix descriptor of wgmma, bits 62 and 63.
enum class Swizzle : uint32_t { none = 0, bytes128 = 1, bytes64 = 2, bytes32 = 3 };

struct MapSpec {
  uint64_t base = 0; // address of element 0, a multiple of 16
  int32_t rank = 0;  // 2..5; an im2col map has rank 4: channel, w, h, n
  bool im2col = false;
  Element element = Element::bfloat16;
  Swizzle swizzle = Swizzle::none;
  uint64_t size[5] = {};              // elements, innermost first; what lies outside reads as zero
  uint64_t stride[4] = {};            // bytes from one element of dimension i + 1 to the next, multiples of 16
  uint32_t box[5] = {};               // tiled: the box, elements
  uint32_t step[5] = {1, 1, 1, 1, 1}; // element strides; im2col: step[1] and step[2] are the strides of the convolution
  int32_t lower[2] = {};              // im2col: first corner of a filter's window (w, h), the negative padding
  int32_t upper[2] = {};              // im2col: last corner, counted from the last column or row
  uint32_t channels = 0;              // im2col: channels of a pixel that one load takes
  uint32_t pixels = 0;                // im2col: pixels that one load takes, along w, then h, then n
};

inline int64_t element_bytes(Element element) { return element == Element::uint8 ? 1 : 2; }

} // namespace inception_fast::hopper
