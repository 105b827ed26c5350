// What wgmma is told of an operand in shared memory. Plain arithmetic that the kernels and their emulation share.
#pragma once

#include <cstdint>

#include "schedule.h"
#include "tensor_map.h"

namespace inception_fast::hopper {

// Its halves stay apart: only `low`, where the address is, changes from product to product, and what is made anew in
// between has to be ready before a narrow tile's next product can start.
struct Descriptor {
  uint32_t low, high;

  // Another operand like this one, `sixteens` times 16 bytes behind it.
  HOST_DEVICE Descriptor operator+(int sixteens) const { return {low + static_cast<uint32_t>(sixteens), high}; }

  HOST_DEVICE uint64_t bits() const { return static_cast<uint64_t>(high) << 32 | low; }
};

// Where a K-major operand lies. With a swizzle, `stride` is the distance of groups of 8 rows and `lead` is unused; a
// step of 16 along K adds 32 bytes to the address. Without one, the operand is made of 8 x 16 byte blocks: `lead` is
// their distance along K and `stride` along the rows.
HOST_DEVICE Descriptor matrix_descriptor(uint32_t address, uint32_t lead, uint32_t stride, Swizzle swizzle) {
  return {(address & 0x3ffff) >> 4 | (lead >> 4) << 16, stride >> 4 | static_cast<uint32_t>(swizzle) << 30};
}

} // namespace inception_fast::hopper
