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

#include "walk_loads.cuh"
#include "walk_pool.cuh"
#include "walk_products.cuh"

namespace inception_fast::hopper {

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
  const Range range = range_of(walk);
  const int units = range.end - range.begin;
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
