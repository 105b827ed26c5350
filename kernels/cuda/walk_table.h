// How the walk's table lies in memory: jobs, units of all blocks one behind the other, and where each block's begin.
#pragma once

#include "walk_plan.h"

namespace inception_fast::hopper {

// One job in the table. MAP is a tensor map as the kernel takes it, of 128 bytes on the device.
template <class MAP> struct alignas(128) JobEntry {
  MAP x, weights;
  Body body;
};

struct WalkTable {
  int64_t units, begin, bytes; // offsets, and the size of it all; jobs are at 0
  int64_t count;               // of units
};

inline WalkTable walk_table(const std::vector<std::vector<Unit>> &lists, int count, int64_t entry) {
  WalkTable table{count * entry, 0, 0, 0};
  for (const std::vector<Unit> &list : lists)
    table.count += static_cast<int64_t>(list.size());
  table.begin = table.units + table.count * static_cast<int64_t>(sizeof(Unit));
  table.bytes = (table.begin + 4 * (static_cast<int64_t>(lists.size()) + 1) + 127) / 128 * 128;
  return table;
}

// Of the table on the device.
inline WalkTable walk_table(const HopperJob *jobs, int count, int blocks) {
  struct alignas(64) Map {
    uint8_t bytes[128];
  };
  return walk_table(walk_lists(jobs, count, blocks), count, sizeof(JobEntry<Map>));
}

// Writes the table to `to`, which is aligned to 128 bytes. `encoded` turns a MapSpec into a MAP.
template <class MAP, class Encoded>
void write_table(const HopperJob *jobs, int count, int type, uint64_t workspace,
                 const std::vector<std::vector<Unit>> &lists, const Encoded &encoded, uint8_t *to) {
  const WalkTable table = walk_table(lists, count, sizeof(JobEntry<MAP>));
  const std::vector<Body> bodies = walk_bodies(jobs, count, workspace);
  for (int i = 0; i < count; ++i) {
    JobEntry<MAP> entry{};
    entry.body = bodies[i];
    if (jobs[i].kind == HOPPER_JOB_CONV) {
      const HopperConfig config = walk_config(jobs[i]);
      MapSpec x = x_map(jobs[i].conv, element_named(type), config);
      if (jobs[i].halo)
        x.box[2] = halo_box(jobs[i]);
      entry.x = encoded(x);
      entry.weights = encoded(weight_map(jobs[i].conv, element_named(type), config));
    }
    std::memcpy(to + i * sizeof entry, &entry, sizeof entry);
  }
  uint8_t *unit = to + table.units;
  std::vector<int32_t> begin{0};
  for (const std::vector<Unit> &list : lists) {
    if (!list.empty())
      std::memcpy(unit, list.data(), list.size() * sizeof(Unit));
    unit += list.size() * sizeof(Unit);
    begin.push_back(begin.back() + static_cast<int32_t>(list.size()));
  }
  std::memcpy(to + table.begin, begin.data(), 4 * begin.size());
}

} // namespace inception_fast::hopper
