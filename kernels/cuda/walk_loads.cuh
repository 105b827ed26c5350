// The warps of the walk that bring what others compute with (walk.cuh): descriptions of units, weights, and x.
#pragma once

#include "walk_parts.cuh"

namespace inception_fast::hopper {

// One warp: descriptions of the block's units.
__device__ void describe_units(const Walk &walk, const WalkShared &shared) {
  const auto [begin, end] = range_of(walk);
  Place place{0, 1};
  int next = begin < end ? walk.units[begin].tile.problem : 0;
  for (int i = begin; i < end; ++i) {
    const Job *job = &walk.jobs[uniform(next)];
    if (i + 1 < end)
      next = walk.units[i + 1].tile.problem; // asked for ahead of the wait
    Slot *slot = &shared.slots[place.stage];
    Barrier *described = &shared.described[place.stage];
    barrier_wait(&shared.slot_empty[place.stage], place.parity);
    prefetch_map(&job->weights);
    prefetch_map(&job->x);
    barrier_expect(described, sizeof(Unit) + sizeof(Body));
    bulk_load(&slot->unit, &walk.units[i], sizeof(Unit), described);
    bulk_load(&slot->body, &job->body, sizeof(Body), described);
    advance(place, WALK_SLOTS);
  }
}

// What a producing warp keeps of a tile, the same in all lanes: shared memory is asked for once, not at each step.
struct Course {
  int steps, chunks, kw, column;
  Corner corner;
  Step step;
  int tap_h, tap_w;
};

__device__ __forceinline__ Course course_of(const Slot &slot) {
  const Unit &unit = slot.unit;
  return {uniform(unit.tile.last - unit.tile.first),
          uniform(slot.body.problem.chunks),
          uniform(slot.body.problem.kw),
          uniform(unit.tile.column * slot.body.columns),
          {uniform(unit.corner.n), uniform(unit.corner.h), uniform(unit.corner.w)},
          {uniform(unit.step.tap), uniform(unit.step.chunk)},
          uniform(unit.tap_h),
          uniform(unit.tap_w)};
}

__device__ __forceinline__ void advance(Course &course) {
  if (++course.step.chunk < course.chunks)
    return;
  course.step.chunk = 0;
  ++course.step.tap;
  if (++course.tap_w == course.kw) {
    course.tap_w = 0;
    ++course.tap_h;
  }
}

// A warp's share of the tile's weights that the ring does not hold, into the level 2 cache: a network's weights are
// more than it keeps from one run to the next, and memory's latency is longer than a stage is free.
__device__ __forceinline__ void ask_ahead(const Job *job, Course course, int warp) {
  constexpr int HELD = WALK_STAGES * WALK_STEPS;
  for (int k = 0; k < course.steps; ++k) {
    if (k >= HELD && k % WEIGHT_WARPS == warp)
      tma_prefetch(&job->weights, course.step.chunk * WALK_DEPTH, course.column, course.step.tap);
    advance(course);
  }
}

// A warp's share of a tile's weights or of x, two steps of K a stage, x copied for each tap.
template <bool WEIGHTS>
__device__ __forceinline__ void load_steps(const Job *job, const WalkShared &shared, Course course, uint32_t bytes,
                                           int warp, Place &place) {
  constexpr int WARPS = WEIGHTS ? WEIGHT_WARPS : X_WARPS;
  for (int k = 0; k < course.steps; k += WALK_STEPS, advance(place, WALK_STAGES)) {
    const bool both = k + 1 < course.steps;
    if (place.stage % WARPS != warp) {
      advance(course);
      if (both)
        advance(course);
      continue;
    }
    uint8_t *to = shared.ring + place.stage * WALK_STAGE_BYTES + (WEIGHTS ? WALK_WEIGHTS : 0);
    Barrier *full = &shared.full[place.stage];
    barrier_wait(&shared.empty[place.stage], place.parity);
    barrier_expect(full, both ? 2 * bytes : bytes);
#pragma unroll
    for (int half = 0; half < WALK_STEPS; ++half)
      if (half == 0 || both) {
        if constexpr (WEIGHTS)
          tma_load(to + half * bytes, &job->weights, full, course.step.chunk * WALK_DEPTH, course.column,
                   course.step.tap);
        else
          tma_load_im2col(to + half * bytes, &job->x, full, course.step.chunk * WALK_DEPTH, course.corner.w,
                          course.corner.h, course.corner.n, static_cast<uint16_t>(course.tap_w),
                          static_cast<uint16_t>(course.tap_h));
        advance(course);
      }
  }
}

// The same warp's share of a tile whose rows of x stay: for every chunk of channels one stage of x, then as many of
// weights as the taps take. Of the stages of its number the warp fills those of its kind; the others it only counts
// itself in at, for whoever waits for a stage waits for both kinds.
template <bool WEIGHTS>
__device__ __forceinline__ void load_halo(const Job *job, const WalkShared &shared, const Slot &slot,
                                          const Course &course, int warp, int lane, Place &place) {
  constexpr int WARPS = WEIGHTS ? WEIGHT_WARPS : X_WARPS;
  const Problem &problem = slot.body.problem;
  const int taps = uniform(problem.taps), columns = uniform(slot.body.columns), each = walk_taps(columns);
  const int rows = uniform(slot.unit.rows), row_bytes = 2 * WALK_DEPTH * uniform(problem.pitch);
  const int top = uniform(problem.top), below = uniform(problem.image_rows) - top, box = uniform(slot.body.box);
  const int tap_bytes = 2 * WALK_DEPTH * columns;
  for (int chunk = 0; chunk < course.chunks; ++chunk)
    for (int first = -each; first < taps; first += each, advance(place, WALK_STAGES)) {
      if (place.stage % WARPS != warp)
        continue;
      uint8_t *to = shared.ring + place.stage * WALK_STAGE_BYTES;
      Barrier *full = &shared.full[place.stage];
      barrier_wait(&shared.empty[place.stage], place.parity);
      if ((first < 0) == WEIGHTS) {
        sync_warp(); // no lane may wait still: whoever is let in ends the phase that it waits for
        if (lane == 0)
          barrier_arrive(full);
      } else if constexpr (WEIGHTS) {
        const int count = taps - first < each ? taps - first : each;
        barrier_expect(full, count * tap_bytes);
        for (int tap = first; tap < first + count; ++tap, to += tap_bytes)
          tma_load(to, &job->weights, full, chunk * WALK_DEPTH, course.column, tap);
      } else {
        barrier_expect(full, (box == 1 ? rows : box) * row_bytes);
        int h = course.corner.h, image = course.corner.n;
        for (int i = 0; i < rows; i += box, to += row_bytes) {
          tma_load(to, &job->x, full, chunk * WALK_DEPTH, course.corner.w, h, image);
          if (++h == below) {
            h = -top;
            ++image;
          }
        }
      }
    }
}

// A warp's share of weights or of x: of the stages of each tile those whose number leaves the warp's own.
template <bool WEIGHTS> __device__ void load_units(const Walk &walk, const WalkShared &shared, int warp, int lane) {
  const Range range = range_of(walk);
  const int units = range.end - range.begin;
  Place place{0, 1}, at{0, 0};
  for (int i = 0; i < units; ++i) {
    barrier_wait(&shared.described[at.stage], at.parity);
    const Slot &slot = shared.slots[at.stage];
    const bool convolution = uniform(slot.body.kind) == HOPPER_JOB_CONV;
    if (convolution && !WEIGHTS) {
      wait_for_needs(walk, slot.body, lane);
      fence_async_global(); // what others stored, before this thread's copies
      if (lane == 0 && warp == 0)
        traced(walk, i, READY);
    }
    if (convolution) {
      const Job *job = &walk.jobs[uniform(slot.unit.tile.problem)];
      const uint32_t bytes = WEIGHTS ? 2 * WALK_DEPTH * uniform(slot.body.columns) : WALK_X_BYTES;
      Course course = course_of(slot);
      const bool halo = uniform(slot.body.halo);
      if (halo)
        load_halo<WEIGHTS>(job, shared, slot, course, warp, lane, place);
      else if (WEIGHTS && uniform(slot.body.ahead))
        ask_ahead(job, course, warp);
      if (!halo) // not an else of the above, where ptxas 13.0 keeps half of a copy's operands in registers
        load_steps<WEIGHTS>(job, shared, course, bytes, warp, place);
    }
    sync_warp();
    if (lane == 0)
      barrier_arrive(&shared.slot_empty[at.stage]);
    advance(at, WALK_SLOTS);
  }
}

} // namespace inception_fast::hopper
