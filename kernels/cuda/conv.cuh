// y = act(residual + residual_scale * (scale * conv(x, weights) + shift)) for a group of convolutions.
//
// x is [n, h, w, c] and y [n, oh, ow, oc] in T, pixels `pitch` elements apart; weights are [kh * kw][oc][c]. Sums are
// float32, a result is rounded once. K is summed in the order of taps, then channels, whatever the tile; parts of a
// split K are added in their order, so the same launch gives the same bits.
//
// Two warps of the first warpgroup fill a ring of stages by TMA: `rows` windows at one tap, which the unit's im2col
// mode gathers over rows and images and fills up with zeros at the borders, and `N` rows of weights, both 128- or
// 64-byte swizzled. The others multiply, 64 rows each: two of them a tile of 128 (HALVES), or in turn, so that some
// multiply while others store (epilogue.cuh): each a tile of 64 (TURNS), or two and two a tile of 128 (TWOS). In a
// cluster of two blocks, which compute tiles below each other, each block loads half of the weights for both.
#pragma once

#include "conv_sizes.h"
#include "epilogue.cuh"
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
static_assert(registers_suffice(HALVES) && registers_suffice(TURNS) && registers_suffice(TWOS),
              "a warpgroup that asks for more than the others gave up waits for ever");
// Warpgroups that share a tile.
HOST_DEVICE constexpr int sharers(int way) { return way == TURNS ? 1 : 2; }

struct Group {
  TensorMap x[MAX_PROBLEMS], weights[MAX_PROBLEMS];
  Problem problem[MAX_PROBLEMS];
  int32_t units;
  int32_t cluster; // 1 or 2
  int32_t stages;
  int32_t depth;   // 64 or 32
  int32_t x_bytes; // of a stage of rows of x, of halo tiles
  int32_t stay;    // 1: all weights of halo tiles fit the ring, and stay there
};

// The ring at the start of shared memory, then what follows it.
struct Shared {
  uint8_t *ring;
  uint8_t *staged;  // [4 * consumers][STAGED_BYTES]
  uint8_t *columns; // [consumers][columns_bytes(N)]
  Barrier *full, *empty;
  uint32_t *last; // [consumers]: whether a warpgroup came last to a tile of split K
};

template <int N, int WAY> __device__ __forceinline__ Shared shared_parts(const Group &group) {
  Shared shared;
  shared.ring = dynamic_shared();
  shared.staged = shared.ring + group.stages * stage_bytes(tile_rows(WAY), N, group.depth);
  shared.columns = shared.staged + 4 * consumers(WAY) * STAGED_BYTES;
  shared.full = reinterpret_cast<Barrier *>(shared.columns + consumers(WAY) * columns_bytes(N));
  shared.empty = shared.full + MAX_STAGES;
  shared.last = reinterpret_cast<uint32_t *>(shared.empty + MAX_STAGES);
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
// waits for its turn. `meanwhile` is done while the last products run. A step's products of a narrow tile take no
// longer than a hundred instructions, so the loop has few: sizes are constants, a stage to release is a number and not
// an address, and the operands' descriptors go on with the ring and are not made anew.
template <int N, int WAY, class T, int DEPTH, class Meanwhile>
__device__ __forceinline__ void multiply(float (&d)[N / 2], const Group &group, const Shared &shared, const Tile &tile,
                                         int warpgroup, int lane, bool more, Place &place, Marks &marks,
                                         const Meanwhile &meanwhile) {
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

// Puts this part's sums into the workspace. The warpgroup that comes last adds up all parts, in their order, and goes
// on with the result; the others get false. counter_add, between two barriers of the warpgroup, orders the writes of
// all its threads before the reads of all threads of the one that comes last: no thread needs a fence of its own.
template <int N, int WAY>
__device__ __forceinline__ bool add_parts(float (&d)[N / 2], const Problem &problem, const Shared &shared,
                                          const Tile &tile, int warpgroup, int thread) {
  const int64_t index = static_cast<int64_t>(tile.row) * problem.column_tiles + tile.column;
  const int part = warpgroup % sharers(WAY);
  constexpr int64_t TILE = tile_rows(WAY) * N;
  float4 *partial = reinterpret_cast<float4 *>(problem.partial) + (index * problem.splits * TILE + part * 64 * N) / 4;
  uint32_t *counter = reinterpret_cast<uint32_t *>(problem.counter) + 2 * index + part;
  float4 *mine = partial + tile.split * (TILE / 4) + thread;
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
    mine[j * WARPGROUP] = make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
  sync_named(GROUP_BARRIER + warpgroup, WARPGROUP);
  if (thread == 0) {
    const bool last = counter_add(counter) + 1 == static_cast<uint32_t>(problem.splits);
    shared.last[warpgroup] = last;
    if (last)
      *counter = 0; // for the next launch
  }
  sync_named(GROUP_BARRIER + warpgroup, WARPGROUP);
  if (!shared.last[warpgroup])
    return false;
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    d[i] = 0;
  constexpr int AT_ONCE = N <= 64 ? 4 : N <= 128 ? 2 : 1; // parts whose loads run together, as registers allow
#pragma unroll AT_ONCE
  for (int split = 0; split < problem.splits; ++split) {
    const float4 *other = partial + split * (TILE / 4) + thread;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float4 value = load_device_16(other + j * WARPGROUP);
      d[4 * j] += value.x;
      d[4 * j + 1] += value.y;
      d[4 * j + 2] += value.z;
      d[4 * j + 3] += value.w;
    }
  }
  return true;
}

// The consumers.
template <int N, int WAY, class T, int DEPTH>
__device__ __forceinline__ void compute_tiles(const Group &group, const Shared &shared, int cluster_index,
                                              int clusters) {
  const int warpgroup = uniform(threadIdx.x / WARPGROUP) - 1;
  const int thread = threadIdx.x % WARPGROUP, lane = thread % 32, warp = thread / 32;
  const uint32_t staged = shared_address(shared.staged) + (warpgroup * 4 + warp) * STAGED_BYTES;
  const uint32_t columns = shared_address(shared.columns) + warpgroup * columns_bytes(N);
  const int mine = warpgroup / sharers(WAY); // turns, where tiles are taken in turn
  Place place{0, 0};
  int turn = 0;
  Marks marks(2 + warpgroup, blockIdx.x == 0 && thread == 0);
  for (int unit = cluster_index; unit < group.units; unit += clusters, turn ^= 1) {
    const Tile tile = tile_of(group.problem, unit, group.cluster, rank_of(group));
    if (WAY != HALVES && turn != mine) {
      skip(place, group.stages, tile.last - tile.first);
      continue;
    }
    const Problem &problem = group.problem[tile.problem];
    marks.at(Passed::TILE);
    const ColumnsShare share = load_columns<N>(problem, tile.column * N, thread);
    const auto rows = [&](int r) {
      const int pixel = tile.row * tile_rows(WAY) + warpgroup % sharers(WAY) * 64 + warp * WARP_ROWS + r;
      return pixel < problem.pixels ? pixel : -1;
    };
    if constexpr (WAY != TWOS)
      prefetch_residual<N>(problem, rows, tile.column * N, lane);
    // A parity tells a phase from the next one, not from the one after that: a warpgroup must not wait for its stages
    // before the other has seen all stages of the tile ahead. It also leaves the tensor cores to one of them at a time.
    if (WAY != HALVES && unit != cluster_index)
      sync_named(TURN_BARRIER + mine, consumers(WAY) * WARPGROUP);
    marks.at(Passed::TURN);
    float d[N / 2];
    const bool more = WAY != HALVES && unit + clusters < group.units;
    const auto meanwhile = [&] {
      if (WAY == HALVES) // where a warp may still store the tile before; else all have met at their turn
        sync_named(GROUP_BARRIER + warpgroup, WARPGROUP);
      keep_columns<N>(columns, share, thread);
      sync_named(GROUP_BARRIER + warpgroup, WARPGROUP);
    };
    multiply<N, WAY, T, DEPTH>(d, group, shared, tile, warpgroup, lane, more, place, marks, meanwhile);
    if (tile.row >= problem.row_tiles)
      continue; // the cluster's other block has the last tile
    if (problem.splits > 1 && !add_parts<N, WAY>(d, problem, shared, tile, warpgroup, thread))
      continue;
    store_tile<N, T, WAY == TWOS>(d, problem, columns, staged, rows, tile.column * N, lane);
    marks.at(Passed::STORED);
  }
}

template <int N, int WAY, class T>
__global__ void __launch_bounds__(conv_threads(WAY), 1) conv(const __grid_constant__ Group group) {
  const Shared shared = shared_parts<N, WAY>(group);
  const int shift = group.cluster - 1; // of 1 or 2
  const int cluster_index = blockIdx.x >> shift, clusters = gridDim.x >> shift;
  grid_launch_dependents();
  if (threadIdx.x == 0) {
    const int warps = 4 * sharers(WAY) * group.cluster;
    for (int i = 0; i < group.stages; ++i) {
      barrier_init(&shared.full[i], 2);
      barrier_init(&shared.empty[i], warps);
    }
    if (group.cluster == 1)
      fence_async_shared();
    else
      fence_barrier_init();
  } else if (threadIdx.x == 32) {
    const int problem = problem_at(group.problem, cluster_index);
    prefetch_map(&group.weights[problem]);
    prefetch_map(&group.x[problem]);
  }
  if (group.cluster == 1) {
    sync_block();
  } else {
    cluster_arrive();
    cluster_wait();
  }
  if (threadIdx.x < WARPGROUP) {
    fewer_registers<loading_registers(WAY)>();
    const int warp = uniform(threadIdx.x / 32);
    if (warp == 0)
      load_tiles<N, WAY, true>(group, shared, cluster_index, clusters);
    else if (warp == 1)
      load_tiles<N, WAY, false>(group, shared, cluster_index, clusters);
    sync_warp();
  } else {
    more_registers<multiplying_registers(WAY)>();
    grid_wait(); // before a residual is read, and before y or the workspace is written
    if (group.depth == 64)
      compute_tiles<N, WAY, T, 64>(group, shared, cluster_index, clusters);
    else
      compute_tiles<N, WAY, T, 32>(group, shared, cluster_index, clusters);
  }
  // The other block may still fill this one's stages' barriers: its memory has to outlive that.
  if (group.cluster != 1) {
    cluster_arrive();
    cluster_wait();
  }
}

} // namespace inception_fast::hopper
