// Many convolutions and pools that depend on each other, by one grid whose blocks stay (walk_api.h).
//
// Each block has a list of units, tiles of 64 pixels or items of pools, made on the host, in the order of the jobs. A
// unit starts when the jobs that its job needs have ended: their counters in global memory have reached what the table
// says. Blocks are all resident, and lists keep the order of jobs, so that somebody can always go on.
//
// Roles beside each other, each walking the block's whole list: one warp brings descriptions of units and jobs to
// shared memory a few units ahead; three bring the weights of tiles, which depend on nothing, into a ring of stages,
// and three wait for what a job needs, then bring x. Each warp serves the stages of its own number, since a warp's
// copies are some 100 cycles apart, whatever they copy. What these warps read of a unit they share out among their
// lanes, so that the compiler knows it to be the same in all of them (hopper.cuh, ONE_LANE). Two warpgroups take units
// in turn, one multiplies while the other stores. What they store is ordered before other blocks' copies by a fence of
// the asynchronous proxy, a barrier and the release of the job's counter.
#pragma once

#include "conv.cuh"
#include "walk_pool.cuh"
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

// The calling warp waits until everything that the job needs has ended. What its jobs wrote is seen after it.
__device__ __forceinline__ void wait_for_needs(const Walk &walk, const Body &body, int lane) {
  const bool mine = lane < body.needs;
  wait_for_counts(mine ? &walk.counters[body.need[lane]] : nullptr, mine ? body.ended[lane] : 0);
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
  const int top = uniform(problem.top), below = uniform(problem.image_rows) - top;
  const int tap_bytes = 2 * WALK_DEPTH * columns;
  for (int chunk = 0; chunk < course.chunks; ++chunk)
    for (int first = -each; first < taps; first += each, advance(place, WALK_STAGES)) {
      if (place.stage % WARPS != warp)
        continue;
      uint8_t *to = shared.ring + place.stage * WALK_STAGE_BYTES;
      Barrier *full = &shared.full[place.stage];
      barrier_wait(&shared.empty[place.stage], place.parity);
      if ((first < 0) == WEIGHTS) {
        if (lane == 0)
          barrier_arrive(full);
      } else if constexpr (WEIGHTS) {
        const int count = taps - first < each ? taps - first : each;
        barrier_expect(full, count * tap_bytes);
        for (int tap = first; tap < first + count; ++tap, to += tap_bytes)
          tma_load(to, &job->weights, full, chunk * WALK_DEPTH, course.column, tap);
      } else {
        barrier_expect(full, rows * row_bytes);
        int h = course.corner.h, image = course.corner.n;
        for (int i = 0; i < rows; ++i, to += row_bytes) {
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
  constexpr int WARPS = WEIGHTS ? WEIGHT_WARPS : X_WARPS;
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
      for (int k = halo ? course.steps : 0; k < course.steps; k += WALK_STEPS) {
        const bool both = k + 1 < course.steps;
        if (place.stage % WARPS != warp) {
          advance(course);
          if (both)
            advance(course);
          advance(place, WALK_STAGES);
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
        advance(place, WALK_STAGES);
      }
    }
    sync_warp();
    if (lane == 0)
      barrier_arrive(&shared.slot_empty[at.stage]);
    advance(at, WALK_SLOTS);
  }
}

// Adds STEPS products of 16 channels.
template <int N, class T, int STEPS>
__device__ __forceinline__ void add_products(float (&d)[N / 2], Descriptor a, Descriptor b) {
#pragma unroll
  for (int k = 0; k < STEPS; ++k)
    wgmma<N, T>(d, a + 2 * k, b + 2 * k, true); // 32 bytes along K, in units of 16
}

// The same as a group of their own.
template <int N, class T, int STEPS>
__device__ __forceinline__ void multiply_group(float (&d)[N / 2], Descriptor a, Descriptor b) {
  wgmma_fence();
  add_products<N, T, STEPS>(d, a, b);
  wgmma_commit();
}

// Products of one step of K, `steps` of 16 channels of it. No branch may stand between a group's fence and its commit.
template <int N, class T>
__device__ __forceinline__ void multiply_step(float (&d)[N / 2], Descriptor a, Descriptor b, int steps) {
  if (steps == 4)
    multiply_group<N, T, 4>(d, a, b);
  else if (steps == 2)
    multiply_group<N, T, 2>(d, a, b);
  else if (steps == 1)
    multiply_group<N, T, 1>(d, a, b);
  else
    multiply_group<N, T, 3>(d, a, b);
}

// d = the sums of a tile's part of K. With `more`, the other warpgroup waits for its turn.
template <int N, class T, class Meanwhile>
__device__ __forceinline__ void multiply_unit(float (&d)[N / 2], const Problem &problem, const WalkShared &shared,
                                              const Unit &unit, int warpgroup, int lane, bool more, Place &place,
                                              const Meanwhile &meanwhile) {
  constexpr int WHOLE = WALK_DEPTH / K_STEP;
  constexpr int A_STEP = WALK_X_BYTES / 16, B_STEP = 2 * WALK_DEPTH * N / 16;
  constexpr int STAGE = WALK_STAGE_BYTES / 16;
  Descriptor a = matrix_descriptor(shared_address(shared.ring), 0, 1024, Swizzle::bytes128) + place.stage * STAGE;
  const int chunks = problem.chunks, last_steps = problem.last_steps, count = unit.tile.last - unit.tile.first;
  int chunk = unit.step.chunk;
  const auto next = [&] { // 16 channels of the step that comes
    const bool end = chunk + 1 == chunks;
    chunk = end ? 0 : chunk + 1;
    return end ? last_steps : WHOLE;
  };
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    d[i] = 0;
  int used = -1; // a stage whose products may still run
  for (int i = 0; i < count; i += WALK_STEPS) {
    const Descriptor b = a + WALK_WEIGHTS / 16;
    const bool both = i + 1 < count;
    const int first = next(), second = both ? next() : 0;
    barrier_wait(&shared.full[place.stage], place.parity);
    if (first == WHOLE && second == WHOLE) {
      wgmma_fence();
      add_products<N, T, WHOLE>(d, a, b);
      add_products<N, T, WHOLE>(d, a + A_STEP, b + B_STEP);
      wgmma_commit();
      wgmma_wait<1>(); // the products of the stage before this one have ended
    } else {
      multiply_step<N, T>(d, a, b, first);
      wgmma_wait<1>();
      if (both)
        multiply_step<N, T>(d, a + A_STEP, b + B_STEP, second);
    }
    if (used >= 0 && lane == 0)
      barrier_arrive(&shared.empty[used]);
    used = place.stage;
    advance(place, WALK_STAGES);
    a = a + (place.stage == 0 ? STAGE - WALK_STAGES * STAGE : STAGE);
  }
  if (more)
    arrive_named(TURN_BARRIER + 1 - warpgroup, 2 * WARPGROUP);
  meanwhile();
  wgmma_wait<0>();
  settle(d);
  if (lane == 0)
    barrier_arrive(&shared.empty[used]);
}

// The same of a tile whose rows of x stay: a tap is the same rows from another pixel on.
template <int N, class T, class Meanwhile>
__device__ __forceinline__ void multiply_halo(float (&d)[N / 2], const Problem &problem, const WalkShared &shared,
                                              const Unit &unit, int warpgroup, int lane, bool more, Place &place,
                                              const Meanwhile &meanwhile) {
  constexpr int ROW = 2 * WALK_DEPTH / 16, TAP = ROW * N, STAGE = WALK_STAGE_BYTES / 16, EACH = walk_taps(N);
  const Descriptor ring = matrix_descriptor(shared_address(shared.ring), 0, 1024, Swizzle::bytes128);
  const int chunks = problem.chunks, taps = problem.taps, kw = problem.kw, down = (problem.pitch - kw) * ROW;
  const int last_steps = problem.last_steps, offset = unit.offset;
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    d[i] = 0;
  int used = -1, used_x = -1; // stages whose products may still run
  const auto release = [&] {
    if (used >= 0 && lane == 0)
      barrier_arrive(&shared.empty[used]);
    if (used_x >= 0 && lane == 0)
      barrier_arrive(&shared.empty[used_x]);
    used = used_x = -1;
  };
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int steps = chunk + 1 == chunks ? last_steps : WALK_DEPTH / K_STEP, x = place.stage;
    barrier_wait(&shared.full[x], place.parity);
    advance(place, WALK_STAGES);
    Descriptor a = ring + (x * STAGE + offset * ROW);
    for (int first = 0, column = 0; first < taps; first += EACH) {
      const int stage = place.stage, end = taps - first < EACH ? taps : first + EACH;
      Descriptor b = ring + stage * STAGE;
      barrier_wait(&shared.full[stage], place.parity);
      for (int tap = first; tap < end; ++tap, b = b + TAP) {
        multiply_step<N, T>(d, a, b, steps);
        wgmma_wait<1>(); // the products of the tap before this one have ended
        release();
        a = a + ROW;
        if (++column == kw) {
          column = 0;
          a = a + down;
        }
      }
      used = stage;
      advance(place, WALK_STAGES);
    }
    used_x = x;
  }
  if (more)
    arrive_named(TURN_BARRIER + 1 - warpgroup, 2 * WARPGROUP);
  meanwhile();
  wgmma_wait<0>();
  settle(d);
  release();
}

// Counts a unit of the job as ended, once all of the warpgroup's stores are made.
__device__ __forceinline__ void end_unit(const Walk &walk, const Body &body, int warpgroup, int thread) {
  fence_async_global(); // own stores, before other blocks' copies
  sync_named(GROUP_BARRIER + warpgroup, WARPGROUP);
  if (thread == 0)
    counter_release(&walk.counters[body.index]);
}

// The warp's sums to a map of float32, two columns at a time: few pixels have one.
template <int N>
__device__ __forceinline__ void store_wide(const float (&d)[N / 2], const Problem &problem, int first, int column,
                                           int lane) {
  const Output &to = problem.output[0];
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const int own = column + 8 * j + lane % 4 * 2;
    if (own >= problem.oc)
      continue;
    const float2 scale = load_constant_8(problem.scale + 4 * static_cast<uint64_t>(own));
    const float2 shift = load_constant_8(problem.shift + 4 * static_cast<uint64_t>(own));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = first + lane / 4 + 8 * half;
      float2 y =
          make_float2(fmaf(d[4 * j + 2 * half], scale.x, shift.x), fmaf(d[4 * j + 2 * half + 1], scale.y, shift.y));
      if (to.relu & 1)
        y = make_float2(y.x < 0 ? 0 : y.x, y.y < 0 ? 0 : y.y);
      if (pixel < problem.pixels)
        store_global_8(reinterpret_cast<void *>(to.y + 4 * static_cast<uint64_t>(pixel * to.pitch + own)), y);
    }
  }
}

template <int N, class T>
__device__ __forceinline__ void convolve_unit(const Walk &walk, const WalkShared &shared, const Slot &slot,
                                              int warpgroup, int thread, int i, bool more, Place &place) {
  const Problem &problem = slot.body.problem;
  const Tile &tile = slot.unit.tile;
  const int lane = thread % 32, warp = thread / 32;
  const uint32_t staged = shared_address(shared.staged) + (warpgroup * 4 + warp) * STAGED_BYTES;
  const uint32_t columns = shared_address(shared.columns) + warpgroup * columns_bytes(WALK_WIDEST);
  const ColumnsShare share = load_columns<N>(problem, tile.column * N, thread);
  const bool halo = slot.body.halo;
  const int from = tile.row * WALK_ROWS + warp * WARP_ROWS;
  const Position at = halo ? position_at(problem, from + lane / 8) : Position{}; // of the first row that it stores
  if (i > 0)
    sync_named(TURN_BARRIER + warpgroup, 2 * WARPGROUP);
  if (thread == 0)
    traced(walk, i, TAKEN);
  float d[N / 2];
  const auto meanwhile = [&] {
    keep_columns<N>(columns, share, thread);
    sync_named(GROUP_BARRIER + warpgroup, WARPGROUP);
  };
  if (halo)
    multiply_halo<N, T>(d, problem, shared, slot.unit, warpgroup, lane, more, place, meanwhile);
  else
    multiply_unit<N, T>(d, problem, shared, slot.unit, warpgroup, lane, more, place, meanwhile);
  if (thread == 0)
    traced(walk, i, SUMMED);
  Shared parts{};
  parts.last = shared.last;
  if (problem.splits > 1 && !add_parts<N, TURNS>(d, problem, parts, tile, warpgroup, thread))
    return;
  const auto rows = [&](int r) {
    if (halo)
      return pixel_of(problem, behind(problem, at, r - lane / 8));
    return from + r < problem.pixels ? from + r : -1;
  };
  if (problem.output[0].relu & HOPPER_FLOAT32)
    store_wide<N>(d, problem, from, tile.column * N, lane);
  else
    store_tile<N, T>(d, problem, columns, staged, rows, tile.column * N, lane);
  end_unit(walk, slot.body, warpgroup, thread);
  if (thread == 0)
    traced(walk, i, ENDED);
}

// Two warpgroups: products, pools and stores.
template <class T> __device__ __forceinline__ void compute_units(const Walk &walk, const WalkShared &shared) {
  const int units = walk.begin[blockIdx.x + 1] - walk.begin[blockIdx.x];
  const int warpgroup = uniform(threadIdx.x / WARPGROUP) - WALK_PRODUCERS / WARPGROUP;
  const int thread = threadIdx.x % WARPGROUP, lane = thread % 32, warp = thread / 32;
  Place place{0, 0}, at{0, 0};
  for (int i = 0; i < units; ++i) {
    barrier_wait(&shared.described[at.stage], at.parity);
    const Slot &slot = shared.slots[at.stage];
    const bool more = i + 1 < units;
    if (i % 2 != warpgroup) {
      skip(place, WALK_STAGES, slot.unit.stages);
    } else if (slot.body.kind == HOPPER_JOB_POOL) {
      if (i > 0)
        sync_named(TURN_BARRIER + warpgroup, 2 * WARPGROUP);
      if (more)
        arrive_named(TURN_BARRIER + 1 - warpgroup, 2 * WARPGROUP);
      if (thread == 0)
        traced(walk, i, TAKEN);
      wait_for_needs(walk, slot.body, lane);
      if (thread == 0)
        traced(walk, i, READY);
      pool_piece<T>(slot.body.pool, slot.unit.tile.row, thread,
                    shared_address(shared.staged) + (warpgroup * 4 + warp) * STAGED_BYTES);
      end_unit(walk, slot.body, warpgroup, thread);
      if (thread == 0)
        traced(walk, i, ENDED);
    } else if (slot.body.columns == 32) {
      convolve_unit<32, T>(walk, shared, slot, warpgroup, thread, i, more, place);
    } else {
      convolve_unit<64, T>(walk, shared, slot, warpgroup, thread, i, more, place);
    }
    sync_warp();
    if (lane == 0)
      barrier_arrive(&shared.slot_empty[at.stage]);
    advance(at, WALK_SLOTS);
  }
}

// The block that ends last leaves all counters as it found them. Nobody waits for one any more.
__device__ void end_walk(const Walk &walk) {
  sync_block();
  if (threadIdx.x == 0 && counter_add(&walk.counters[walk.count]) + 1 == gridDim.x)
    for (int i = 0; i <= walk.count; ++i)
      walk.counters[i] = 0;
}

template <class T> __global__ void __launch_bounds__(WALK_THREADS, 1) walk_jobs(const __grid_constant__ Walk walk) {
  const WalkShared shared = walk_parts();
  if (threadIdx.x == 0) {
    for (int i = 0; i < WALK_STAGES; ++i) {
      barrier_init(&shared.full[i], 2);
      barrier_init(&shared.empty[i], 4);
    }
    for (int i = 0; i < WALK_SLOTS; ++i) {
      barrier_init(&shared.described[i], 1);
      barrier_init(&shared.slot_empty[i], X_WARPS + WEIGHT_WARPS + CONSUMER_WARPS);
    }
    fence_async_shared();
  }
  sync_block();
  if (threadIdx.x < WALK_PRODUCERS) {
    fewer_registers<56>();
    const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
    if (warp < X_WARPS)
      load_units<false>(walk, shared, warp, lane);
    else if (warp < X_WARPS + WEIGHT_WARPS)
      load_units<true>(walk, shared, warp - X_WARPS, lane);
    else if (warp == X_WARPS + WEIGHT_WARPS)
      describe_units(walk, shared);
    sync_warp();
  } else {
    more_registers<200>();
    compute_units<T>(walk, shared);
  }
  end_walk(walk);
}

} // namespace inception_fast::hopper
