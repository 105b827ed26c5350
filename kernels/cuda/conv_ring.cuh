// The ring of stages that the convolutions of conv.cuh and behind.cuh multiply from: what a launch is told, where its
// parts lie in shared memory, the warps that fill the ring, and a tile's sums.
#pragma once

#include "conv_sizes.h"
#include "hopper.cuh"
#include "marks.cuh"
#include "schedule.h"

namespace inception_fast::hopper {

constexpr int GROUP_BARRIER = 1; // named barriers of one warpgroup each, up to 4
constexpr int TURN_BARRIER = 5;  // 5 and 6: the turn of the one or two warpgroups has come

HOST_DEVICE constexpr int conv_threads(int way) { return WARPGROUP * (1 + consumers(way)); }
// Of each thread: what the block gets is dealt anew.
HOST_DEVICE constexpr int given_registers(int way) { return 65536 / conv_threads(way) / 8 * 8; }
HOST_DEVICE constexpr int loading_registers(int way) { return way == TWOS ? 32 : 56; }
HOST_DEVICE constexpr int multiplying_registers(int way) { return way == TWOS ? 112 : 224; }
HOST_DEVICE constexpr bool registers_suffice(int way) {
  return loading_registers(way) + consumers(way) * multiplying_registers(way) <=
         (1 + consumers(way)) * given_registers(way);
}
static_assert(registers_suffice(HALVES) && registers_suffice(TURNS) && registers_suffice(TWOS) &&
                  registers_suffice(BEHIND),
              "a warpgroup that asks for more than the others gave up waits for ever");
// Warpgroups that share a tile.
HOST_DEVICE constexpr int sharers(int way) { return way == TURNS ? 1 : 2; }
HOST_DEVICE constexpr bool in_turn(int way) { return way == TURNS || way == TWOS; }

struct Group {
  TensorMap x[MAX_PROBLEMS], weights[MAX_PROBLEMS], residual[MAX_PROBLEMS]; // the last where it is stored behind
  Problem problem[MAX_PROBLEMS];
  int32_t units;
  int32_t cluster; // 1 or 2
  int32_t stages;
  int32_t depth;   // 64 or 32
  int32_t x_bytes; // of a stage of rows of x, of halo tiles
  int32_t stay;    // 1: all weights of halo tiles fit the ring, and stay there
  int32_t ring;    // rows of results of tiles that are pooled
};

// The ring at the start of shared memory, then what follows it.
struct Shared {
  uint8_t *ring;
  uint8_t *staged;  // [consumers][staged_bytes(WAY, N)]
  uint8_t *columns; // [consumers][columns_bytes(N)]
  Barrier *full, *empty;
  Barrier *ready, *made; // [consumers]: a residual lies in staging memory, which is free otherwise; results lie there
  uint32_t *last;        // [consumers]: whether a warpgroup came last to a tile of split K
};

template <int N, int WAY> __device__ __forceinline__ Shared shared_parts(const Group &group) {
  Shared shared;
  shared.ring = dynamic_shared();
  shared.staged = shared.ring + group.stages * stage_bytes(tile_rows(WAY), N, group.depth);
  shared.columns = shared.staged + consumers(WAY) * staged_bytes(WAY, N);
  shared.full = reinterpret_cast<Barrier *>(shared.columns + consumers(WAY) * columns_bytes(N));
  shared.empty = shared.full + MAX_STAGES;
  shared.ready = shared.empty + MAX_STAGES;
  shared.made = shared.ready + consumers(WAY);
  shared.last = reinterpret_cast<uint32_t *>(shared.made + consumers(WAY));
  return shared;
}

// This block's place in its cluster. Asking again costs less than a register for the whole of a kernel.
__device__ __forceinline__ int rank_of(const Group &group) { return group.cluster == 1 ? 0 : cluster_rank(); }

// The producers, two warps: one brings x, one the weights, each its own bytes of a stage. Weights do not come from an
// earlier grid, so the second one fills the ring while the first still waits for that grid to end.
template <int N, int WAY, bool WEIGHTS>
__device__ void load_tiles(const Group &group, const Shared &shared, int cluster_index, int clusters) {
  constexpr int ROWS = tile_rows(WAY);
  const int x_bytes = 2 * group.depth * ROWS, weight_bytes = 2 * group.depth * N;
  const int rank = rank_of(group), part = N / group.cluster; // rows of weights that this block loads
  Place place{0, 1}; // nothing has been used yet: the first wait for an empty stage passes
  Marks marks(WEIGHTS, blockIdx.x == 0 && threadIdx.x % 32 == 0);
  for (int unit = cluster_index; unit < group.units; unit += clusters) {
    marks.at(Passed::TILE);
    const Tile tile = tile_of(group.problem, unit, group.cluster, rank);
    const Problem &problem = group.problem[tile.problem];
    const TensorMap *x = &group.x[tile.problem], *weights = &group.weights[tile.problem];
    const Corner corner = corner_of(problem, tile.row, ROWS);
    Step step = step_of(problem, tile.first);
    int tap_w = 0, tap_h = 0; // kept up by hand: a division takes long
    if (step.tap > 0) {
      tap_w = step.tap % problem.kw;
      tap_h = step.tap / problem.kw;
    }
    if (!WEIGHTS && unit == cluster_index)
      grid_wait(); // before x is read
    marks.at(Passed::READY);
    for (int i = tile.first; i < tile.last; ++i) {
      uint8_t *stage = shared.ring + place.stage * (x_bytes + weight_bytes);
      Barrier *full = &shared.full[place.stage];
      marks.waits();
      barrier_wait(&shared.empty[place.stage], place.parity);
      marks.goes_on();
      const int c = step.chunk * group.depth, column = tile.column * N + rank * part;
      if constexpr (!WEIGHTS) {
        barrier_expect(full, x_bytes);
        tma_load_im2col(stage, x, full, c, corner.w, corner.h, corner.n, static_cast<uint16_t>(tap_w),
                        static_cast<uint16_t>(tap_h));
      } else {
        barrier_expect(full, weight_bytes);
        uint8_t *to = stage + x_bytes + 2 * group.depth * rank * part;
        if (group.cluster == 1)
          tma_load(to, weights, full, c, column, step.tap);
        else
          tma_load_multicast(to, weights, full, 3, c, column, step.tap);
      }
      const int tap = step.tap;
      advance(problem, step);
      if (step.tap != tap && ++tap_w == problem.kw) {
        tap_w = 0;
        ++tap_h;
      }
      advance(place, group.stages);
    }
    marks.spent();
    marks.at(Passed::END);
  }
}

// Tells the producers of the cluster that this warp is done with a stage.
__device__ __forceinline__ void release(const Group &group, Barrier *empty, int lane) {
  if (group.cluster == 1) {
    if (lane == 0)
      barrier_arrive(empty);
  } else if (lane < group.cluster) {
    barrier_arrive_remote(empty, lane);
  }
}

// STEPS steps of a stage as one group. A branch between fence and commit would make the compiler end the group early
// and put an empty one behind it, and the wait for all but the newest group would then be a wait for everything.
template <int N, class T, int STEPS>
__device__ __forceinline__ void multiply_steps(float (&d)[N / 2], Descriptor a, Descriptor b, bool accumulate) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < STEPS; ++k)
    wgmma<N, T>(d, a + 2 * k, b + 2 * k, accumulate || k > 0); // 32 bytes along K, in units of 16
  wgmma_commit();
}

// The same for a number of steps that is known at run time, up to DEPTH / 16; most stages are whole.
template <int N, class T, int DEPTH>
__device__ __forceinline__ void multiply_stage(float (&d)[N / 2], Descriptor a, Descriptor b, int steps,
                                               bool accumulate) {
  constexpr int WHOLE = DEPTH / K_STEP;
  if (steps == WHOLE)
    multiply_steps<N, T, WHOLE>(d, a, b, accumulate);
  else if (WHOLE > 2 && steps == 2)
    multiply_steps<N, T, 2>(d, a, b, accumulate);
  else if (WHOLE > 3 && steps == 3)
    multiply_steps<N, T, 3>(d, a, b, accumulate);
  else
    multiply_steps<N, T, 1>(d, a, b, accumulate);
}

// d = the tile's sums over its part of K, for the 64 rows of the calling warpgroup. With `more`, the other warpgroup
// waits for its turn. `begun` is done behind the first products, `meanwhile` while the last ones run. A step's products
// of a narrow tile take no longer than a hundred instructions, so the loop has few: sizes are constants, a stage to
// release is a number and not an address, and the operands' descriptors go on with the ring and are not made anew.
template <int N, int WAY, class T, int DEPTH, class Begun, class Meanwhile>
__device__ __forceinline__ void multiply(float (&d)[N / 2], const Group &group, const Shared &shared, const Tile &tile,
                                         int warpgroup, int lane, bool more, Place &place, Marks &marks,
                                         const Begun &begun, const Meanwhile &meanwhile) {
  constexpr int ROW = 2 * DEPTH, X_BYTES = ROW * tile_rows(WAY), STAGE = (X_BYTES + ROW * N) / 16;
  constexpr Swizzle SWIZZLE = DEPTH == 64 ? Swizzle::bytes128 : Swizzle::bytes64;
  const Problem &problem = group.problem[tile.problem];
  const uint32_t ring = shared_address(shared.ring);
  const uint32_t mine = warpgroup % sharers(WAY) * 64 * ROW;
  const int weights = (X_BYTES - static_cast<int>(mine)) / 16; // from the rows of x, as descriptors count
  Descriptor a = matrix_descriptor(ring + mine, 0, 8 * ROW, SWIZZLE) + place.stage * STAGE;
  const int chunks = problem.chunks, last_steps = problem.last_steps, stages = group.stages;
  int chunk = step_of(problem, tile.first).chunk, used = -1; // a stage whose products may still run
  for (int i = tile.first; i < tile.last; ++i) {
    const bool end = chunk + 1 == chunks;
    marks.waits();
    barrier_wait(&shared.full[place.stage], place.parity);
    marks.goes_on();
    multiply_stage<N, T, DEPTH>(d, a, a + weights, end ? last_steps : DEPTH / K_STEP, i > tile.first);
    wgmma_wait<1>(); // the products of the stage before this one have ended
    if (used >= 0)
      release(group, &shared.empty[used], lane);
    if (i == tile.first)
      begun();
    used = place.stage;
    chunk = end ? 0 : chunk + 1;
    advance(place, stages);
    a = a + (place.stage == 0 ? STAGE - stages * STAGE : STAGE);
  }
  if (more)
    arrive_named(TURN_BARRIER + 1 - warpgroup / sharers(WAY), consumers(WAY) * WARPGROUP);
  marks.spent();
  marks.at(Passed::ISSUED);
  meanwhile();
  wgmma_wait<0>();
  settle(d);
  marks.at(Passed::SUMS);
  release(group, &shared.empty[used], lane);
}

} // namespace inception_fast::hopper
