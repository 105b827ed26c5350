// The walk's products (walk.cuh): a tile's sums from the ring, by one warpgroup.
#pragma once

#include "walk_parts.cuh"

namespace inception_fast::hopper {

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

} // namespace inception_fast::hopper
