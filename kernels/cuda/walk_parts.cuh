// What all roles of the walk share (walk.cuh): what the kernel is given, its shared memory, marks, and the wait for a
// job's needs.
#pragma once

#include "conv.cuh"
#include "walk_schedule.h"
#include "walk_table.h"

namespace inception_fast::hopper {

using Job = JobEntry<TensorMap>;

struct Walk {
  const Job *jobs;
  const Unit *units;    // of all blocks, one block's behind the other's
  const int32_t *begin; // [blocks + 1]: where a block's units begin
  uint32_t *counters;   // [jobs + 1]: of jobs, and of blocks that are done
  int32_t count;        // of jobs
  uint64_t *trace;      // [units][TRACE_MARKS]: nanoseconds; or null
};

// What a trace has of a unit: its warpgroup came to it, what it needs had ended, its sums were there, it ended.
enum Mark { TAKEN, READY, SUMMED, ENDED, TRACE_MARKS };
static_assert(TRACE_MARKS == HOPPER_WALK_MARKS, "the interface and the kernel agree");

// The block's unit number `i` has come to this mark; one thread of each role says so.
__device__ __forceinline__ void traced(const Walk &walk, int i, Mark mark) {
  if (walk.trace)
    walk.trace[(walk.begin[blockIdx.x] + i) * int64_t{TRACE_MARKS} + mark] = nanoseconds();
}

// What the kernel is given, for a table and a workspace at these addresses.
inline Walk walk_of(const std::vector<std::vector<Unit>> &lists, int count, uint64_t table, uint64_t workspace) {
  const WalkTable places = walk_table(lists, count, sizeof(Job));
  return {reinterpret_cast<const Job *>(table),
          reinterpret_cast<const Unit *>(table + places.units),
          reinterpret_cast<const int32_t *>(table + places.begin),
          reinterpret_cast<uint32_t *>(workspace),
          count,
          nullptr};
}

struct WalkShared {
  uint8_t *ring;
  uint8_t *staged, *columns;
  Slot *slots;
  Barrier *full, *empty;           // of stages
  Barrier *described, *slot_empty; // of slots
  uint32_t *last;
};

__device__ __forceinline__ WalkShared walk_parts() {
  WalkShared shared;
  shared.ring = dynamic_shared();
  shared.staged = shared.ring + WALK_STAGES * WALK_STAGE_BYTES;
  shared.columns = shared.staged + CONSUMER_WARPS * STAGED_BYTES;
  shared.slots = reinterpret_cast<Slot *>(shared.columns + 2 * columns_bytes(WALK_WIDEST));
  shared.full = reinterpret_cast<Barrier *>(shared.slots + WALK_SLOTS);
  shared.empty = shared.full + WALK_STAGES;
  shared.described = shared.empty + WALK_STAGES;
  shared.slot_empty = shared.described + WALK_SLOTS;
  shared.last = reinterpret_cast<uint32_t *>(shared.slot_empty + WALK_SLOTS);
  return shared;
}

// Of the block's list: where it begins and ends.
struct Range {
  int begin, end;
};

__device__ __forceinline__ Range range_of(const Walk &walk) {
  return {uniform(walk.begin[blockIdx.x]), uniform(walk.begin[blockIdx.x + 1])};
}

// The calling warp waits until everything that the job needs has ended. What its jobs wrote is seen after it.
__device__ __forceinline__ void wait_for_needs(const Walk &walk, const Body &body, int lane) {
  const bool mine = lane < body.needs;
  wait_for_counts(mine ? &walk.counters[body.need[lane]] : nullptr, mine ? body.ended[lane] : 0);
}

} // namespace inception_fast::hopper
