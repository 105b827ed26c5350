// What the plans of all kernels have in common: maps of packed weights, grids, reasons, and how answers reach the
// caller of the C interface. Arithmetic without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "api.h"
#include "tensor_map.h"

namespace inception_fast::hopper {

inline Element element_named(int type) { return type == HOPPER_BFLOAT16 ? Element::bfloat16 : Element::float16; }

// Weights packed as [taps][oc][c]: `rows` output channels at one tap, `depth` channels of each, those past the ends
// zero. The swizzle is as wide as a row.
inline MapSpec weights_map(uint64_t base, int64_t taps, int oc, int c, Element element, int depth, int rows) {
  MapSpec map;
  map.base = base;
  map.rank = 3;
  map.element = element;
  map.swizzle = depth == 64 ? Swizzle::bytes128 : Swizzle::bytes64;
  map.size[0] = c;
  map.size[1] = oc;
  map.size[2] = taps;
  map.stride[0] = 2 * map.size[0];
  map.stride[1] = map.stride[0] * map.size[1];
  map.box[0] = depth;
  map.box[1] = rows;
  map.box[2] = 1;
  return map;
}

// Blocks of a grid of whole clusters that share out `units`: at most `most`, but at least one cluster.
inline int grid_blocks(int64_t units, int cluster, int most) {
  return static_cast<int>(std::min<int64_t>(units, std::max(most / cluster, 1))) * cluster;
}

// Why something cannot run: each has the value seen and the value allowed.
struct Reasons {
  std::vector<std::string> list;
  std::string where; // ahead of each

  void require(bool holds, const std::string &seen, const std::string &allowed) {
    if (!holds)
      list.push_back(where + seen + "; allowed: " + allowed);
  }
  void between(const char *name, int64_t value, int64_t least, int64_t most) {
    require(value >= least && value <= most, std::string(name) + " " + std::to_string(value),
            std::to_string(least) + " to " + std::to_string(most));
  }
  void address(const char *name, uint64_t value) {
    require(value != 0 && value % 16 == 0, std::string("address ") + std::to_string(value) + " of " + name,
            "multiples of 16 that are not 0");
  }
};

// Writes as many as fit; returns how many there are.
template <class T> int32_t copied(const std::vector<T> &all, T *to, int32_t capacity) {
  const int32_t count = static_cast<int32_t>(all.size());
  std::copy_n(all.begin(), std::min(count, std::max(capacity, 0)), to);
  return count;
}

// Writes the reasons, one a line, as far as they fit; returns how many there are.
inline int32_t written(const std::vector<std::string> &reasons, char *text, int64_t capacity) {
  std::string lines;
  for (const std::string &reason : reasons)
    lines += (lines.empty() ? "" : "\n") + reason;
  if (capacity > 0) {
    const size_t bytes = std::min(lines.size(), static_cast<size_t>(capacity - 1));
    std::memcpy(text, lines.data(), bytes);
    text[bytes] = 0;
  }
  return static_cast<int32_t>(reasons.size());
}

} // namespace inception_fast::hopper
