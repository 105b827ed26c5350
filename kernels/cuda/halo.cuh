// The convolution of conv.cuh at stride 1, by tiles whose rows of x stay in shared memory for all taps.
//
// A tile is a run of positions of the padded map (halo_schedule.h), PARTS times 64 of each warpgroup. For every
// `depth` channels the rows that it needs cross from L2 once, and a tap is the same rows from another pixel on: where
// tiles of conv.cuh copy x kh * kw times, these copy it about twice. Positions without an output, the last kw - 1 of a
// row and the last kh - 1 rows of an image, are multiplied as well and not stored.
//
// Two warps of the first warpgroup fill two stages of x, a row of the padded map a copy, zeros outside of the map,
// and a ring of weights, N rows at one tap; where the ring holds all there are, they stay. Rows are 128- or 64-byte
// swizzled by their address, so an operand may begin at any pixel. K is summed in chunks of channels, in each by taps,
// whatever the batch.
//
// On an H200 the fastest tiles there are for the 5x5 and most of the 3x3 of v3 (CONTRIBUTING).
#pragma once

#include "conv.cuh"
#include "halo_schedule.h"

namespace inception_fast::hopper {

struct HaloShared {
  uint8_t *x, *weights, *staged, *columns;
  Barrier *full, *empty, *x_full, *x_empty;
};

template <int N, int WARPGROUPS> __device__ __forceinline__ HaloShared halo_shared(const Group &group) {
  HaloShared shared;
  shared.x = dynamic_shared();
  shared.weights = shared.x + HALO_STAGES * group.x_bytes;
  shared.staged = shared.weights + group.stages * stage_bytes(0, N, group.depth);
  shared.columns = shared.staged + 4 * WARPGROUPS * STAGED_BYTES;
  shared.full = reinterpret_cast<Barrier *>(shared.columns + WARPGROUPS * columns_bytes(N));
  shared.empty = shared.full + MAX_STAGES;
  shared.x_full = shared.empty + MAX_STAGES;
  shared.x_empty = shared.x_full + HALO_STAGES;
  return shared;
}

// The rows of a tile, a chunk of channels a stage; by a whole warp.
__device__ __forceinline__ void load_tile_rows(const Group &group, const HaloShared &shared, const TensorMap &map,
                                               const Problem &problem, const Rows &rows, Place &place, Marks &marks) {
  const int bytes = 2 * group.depth * problem.pitch;
  const int first_image = rows.first / problem.image_rows;
  const int first_h = rows.first - first_image * problem.image_rows;
  for (int chunk = 0; chunk < problem.chunks; ++chunk) {
    Barrier *full = &shared.x_full[place.stage];
    marks.waits();
    barrier_wait(&shared.x_empty[place.stage], place.parity);
    marks.goes_on();
    barrier_expect(full, rows.count * bytes);
    int image = first_image, h = first_h;
    uint8_t *to = shared.x + place.stage * group.x_bytes;
    for (int i = 0; i < rows.count; ++i, to += bytes) {
      tma_load(to, &map, full, chunk * group.depth, -problem.left, h - problem.top, image);
      if (++h == problem.image_rows) {
        h = 0;
        ++image;
      }
    }
    advance(place, HALO_STAGES);
  }
}

// One warp: the rows of each tile.
__device__ __forceinline__ void load_rows(const Group &group, const HaloShared &shared, int positions) {
  Place place{0, 1}; // nothing has been used yet: the first wait for an empty stage passes
  Marks marks(0, blockIdx.x == 0 && threadIdx.x % 32 == 0);
  for (int unit = blockIdx.x; unit < group.units; unit += gridDim.x) {
    marks.at(Passed::TILE);
    const Tile tile = tile_of(group.problem, unit, 1, 0);
    const Problem &problem = group.problem[tile.problem];
    marks.at(Passed::READY);
    load_tile_rows(group, shared, group.x[tile.problem], problem, rows_of(problem, tile.row, positions), place, marks);
    marks.spent();
    marks.at(Passed::END);
  }
}

// Weights of the N columns from `column` on, in the order in which they are used; by a whole warp.
template <int N>
__device__ __forceinline__ void load_tile_taps(const Group &group, const HaloShared &shared, const TensorMap &map,
                                               const Problem &problem, int column, Place &place) {
  const int bytes = stage_bytes(0, N, group.depth);
  for (int chunk = 0; chunk < problem.chunks; ++chunk)
    for (int tap = 0; tap < problem.taps; ++tap) {
      Barrier *full = &shared.full[place.stage];
      barrier_wait(&shared.empty[place.stage], place.parity);
      barrier_expect(full, bytes);
      tma_load(shared.weights + place.stage * bytes, &map, full, chunk * group.depth, column, tap);
      advance(place, group.stages);
    }
}

// One warp: the weights of each tile, those that stay once.
template <int N> __device__ __forceinline__ void load_taps(const Group &group, const HaloShared &shared) {
  Place place{0, 1};
  for (int unit = blockIdx.x; unit < group.units; unit += group.stay ? group.units : gridDim.x) {
    const Tile tile = tile_of(group.problem, unit, 1, 0);
    load_tile_taps<N>(group, shared, group.weights[tile.problem], group.problem[tile.problem], tile.column * N, place);
  }
}

// STEPS steps along K of every part of a warpgroup as one group; APART is the distance of parts in a descriptor.
template <int N, int PARTS, class T, int APART, int STEPS>
__device__ __forceinline__ void multiply_parts(float (&d)[PARTS][N / 2], Descriptor a, Descriptor b, bool accumulate) {
  wgmma_fence();
#pragma unroll
  for (int part = 0; part < PARTS; ++part)
#pragma unroll
    for (int k = 0; k < STEPS; ++k)
      wgmma<N, T>(d[part], a + part * APART + 2 * k, b + 2 * k, accumulate || k > 0);
  wgmma_commit();
}

// Where a consuming warp is in both rings. `lead`: how many taps the first half of the warpgroups goes ahead before it
// lets the others start: then their epilogues do not meet, and one half has the tensor cores while the other stores.
// `used` and `used_x`: stages whose products may still run, or -1.
struct HaloPlace {
  Place x, weights;
  int lead, used, used_x;
};

template <int DEPTH> __device__ __forceinline__ Descriptor rows_descriptor(uint32_t address) {
  return matrix_descriptor(address, 0, 16 * DEPTH, DEPTH == 64 ? Swizzle::bytes128 : Swizzle::bytes64);
}

// Lets the second half of the warpgroups start.
template <int WARPGROUPS> __device__ __forceinline__ void let_others_start() {
  arrive_named(GROUP_BARRIER + WARPGROUPS, WARPGROUPS * WARPGROUP);
}

// Lets go of the rows of x before those whose products have just been given out.
__device__ __forceinline__ void release_rows(const HaloShared &shared, HaloPlace &place, int lane) {
  if (place.used_x >= 0 && lane == 0)
    barrier_arrive(&shared.x_empty[place.used_x]);
  place.used_x = -1;
}

// d += the products of one chunk of channels, STEPS times 16 of them, at all taps. `a` describes the rows of x from
// the warpgroup's first position on, `b` where weights are: those of this chunk where they STAY, else those of stage 0.
// The loop's body is a chain of few instructions: of narrow tiles a tap's products take no longer than a hundred of
// them.
template <int N, int PARTS, int WARPGROUPS, class T, int DEPTH, bool STAY, int STEPS>
__device__ __forceinline__ void multiply_chunk(float (&d)[PARTS][N / 2], const Group &group, const HaloShared &shared,
                                               const Problem &problem, Descriptor a, Descriptor b, bool more, int lane,
                                               HaloPlace &place) {
  constexpr int ROW = 2 * DEPTH / 16; // of a pixel, as descriptors count
  const int taps = problem.taps, kw = problem.kw, down = (problem.pitch - kw) * ROW, stages = group.stages;
  for (int tap = 0, column = 0; tap < taps; ++tap) {
    if constexpr (STAY) {
      multiply_parts<N, PARTS, T, 64 * ROW, STEPS>(d, a, b, more || tap > 0);
      b = b + N * ROW;
    } else {
      barrier_wait(&shared.full[place.weights.stage], place.weights.parity);
      multiply_parts<N, PARTS, T, 64 * ROW, STEPS>(d, a, b + place.weights.stage * (N * ROW), more || tap > 0);
    }
    wgmma_wait<1>(); // the products of the tap before this one have ended
    release_rows(shared, place, lane);
    if constexpr (!STAY) {
      if (place.lead > 0 && --place.lead == 0)
        let_others_start<WARPGROUPS>();
      if (place.used >= 0 && lane == 0)
        barrier_arrive(&shared.empty[place.used]);
      place.used = place.weights.stage;
      advance(place.weights, stages);
    }
    a = a + ROW;
    if (++column == kw) {
      column = 0;
      a = a + down;
    }
  }
}

// d = the sums of the calling warpgroup's parts of a tile, whose first position is at `offset` in the rows of x.
template <int N, int PARTS, int WARPGROUPS, class T, int DEPTH, bool STAY>
__device__ __forceinline__ void multiply_halo(float (&d)[PARTS][N / 2], const Group &group, const HaloShared &shared,
                                              const Problem &problem, int offset, int lane, HaloPlace &place,
                                              Marks &marks) {
  const uint32_t x = shared_address(shared.x) + offset * 2 * DEPTH;
  const int apart = STAY ? problem.taps * stage_bytes(0, N, DEPTH) / 16 : 0; // weights of a chunk from the next one's
  Descriptor b = rows_descriptor<DEPTH>(shared_address(shared.weights));
  place.used = place.used_x = -1;
  for (int chunk = 0; chunk < problem.chunks; ++chunk, b = b + apart) {
    const int steps = chunk + 1 == problem.chunks ? problem.last_steps : DEPTH / K_STEP;
    const Descriptor a = rows_descriptor<DEPTH>(x + place.x.stage * group.x_bytes);
    const bool more = chunk > 0;
    marks.waits();
    barrier_wait(&shared.x_full[place.x.stage], place.x.parity);
    marks.goes_on();
    if (steps == 2)
      multiply_chunk<N, PARTS, WARPGROUPS, T, DEPTH, STAY, 2>(d, group, shared, problem, a, b, more, lane, place);
    else if (steps == 1)
      multiply_chunk<N, PARTS, WARPGROUPS, T, DEPTH, STAY, 1>(d, group, shared, problem, a, b, more, lane, place);
    if constexpr (DEPTH == 64) {
      if (steps == 4)
        multiply_chunk<N, PARTS, WARPGROUPS, T, DEPTH, STAY, 4>(d, group, shared, problem, a, b, more, lane, place);
      else if (steps == 3)
        multiply_chunk<N, PARTS, WARPGROUPS, T, DEPTH, STAY, 3>(d, group, shared, problem, a, b, more, lane, place);
    }
    place.used_x = place.x.stage;
    advance(place.x, HALO_STAGES);
    if (STAY && place.lead > 0 && (chunk + 1 == problem.chunks || chunk + 1 == HALO_STAGES)) {
      place.lead = 0; // as far ahead as the stages of x let it, or a whole tile
      let_others_start<WARPGROUPS>();
    }
  }
  marks.spent();
  marks.at(Passed::ISSUED);
  wgmma_wait<0>();
#pragma unroll
  for (int part = 0; part < PARTS; ++part)
    settle(d[part]);
  marks.at(Passed::SUMS);
  release_rows(shared, place, lane);
  if (!STAY && lane == 0)
    barrier_arrive(&shared.empty[place.used]);
}

// What a warpgroup keeps of the columns of all tiles, and a wait for all weights: where these stay there is one tile of
// columns.
template <int N>
__device__ __forceinline__ void keep_all(const Group &group, const HaloShared &shared, uint32_t columns, int warpgroup,
                                         int thread) {
  const Problem &problem = group.problem[0];
  keep_columns<N>(columns, load_columns<N>(problem, 0, thread), thread);
  for (int stage = 0; stage < problem.taps * problem.chunks; ++stage)
    barrier_wait(&shared.full[stage], 0);
  sync_named(GROUP_BARRIER + warpgroup, WARPGROUP);
}

// The consumers.
template <int N, int PARTS, int WARPGROUPS, class T, int DEPTH, bool STAY>
__device__ __forceinline__ void compute_halo(const Group &group, const HaloShared &shared) {
  constexpr int POSITIONS = 64 * PARTS * WARPGROUPS;
  const int warpgroup = uniform(threadIdx.x / WARPGROUP) - 1;
  const int thread = threadIdx.x % WARPGROUP, lane = thread % 32, warp = thread / 32;
  const uint32_t staged = shared_address(shared.staged) + (warpgroup * 4 + warp) * STAGED_BYTES;
  const uint32_t columns = shared_address(shared.columns) + warpgroup * columns_bytes(N);
  HaloPlace place{{0, 0}, {0, 0}, 0, -1, -1};
  Marks marks(2 + warpgroup, blockIdx.x == 0 && thread == 0);
  if constexpr (STAY)
    keep_all<N>(group, shared, columns, warpgroup, thread);
  if (warpgroup < WARPGROUPS / 2)
    place.lead = halo_lead(group.problem[problem_at(group.problem, blockIdx.x)], group.stages);
  else
    sync_named(GROUP_BARRIER + WARPGROUPS, WARPGROUPS * WARPGROUP);
  const int mine = warpgroup * 64 * PARTS, stored = mine + warp * WARP_ROWS + lane / 8; // of a tile's positions
  // Where there is one problem, its tiles lie at equal distances.
  Position begin{}, own{}, apart{};
  if constexpr (STAY) {
    begin = position_at(group.problem[0], blockIdx.x * POSITIONS);
    own = position_at(group.problem[0], blockIdx.x * POSITIONS + stored);
    apart = position_at(group.problem[0], gridDim.x * POSITIONS);
  }
  for (int unit = blockIdx.x; unit < group.units; unit += gridDim.x) {
    marks.at(Passed::TILE);
    const Tile tile = STAY ? Tile{0, unit, 0, 0, 0, 0} : tile_of(group.problem, unit, 1, 0);
    const Problem &problem = group.problem[tile.problem];
    ColumnsShare share;
    if constexpr (!STAY) {
      share = load_columns<N>(problem, tile.column * N, thread);
      own = position_at(problem, tile.row * POSITIONS + stored);
    }
    Position at = own; // of the first row that this lane stores
    float d[PARTS][N / 2];
    const int offset = (STAY ? begin.w : rows_of(problem, tile.row, POSITIONS).offset) + mine;
    marks.at(Passed::TURN);
    multiply_halo<N, PARTS, WARPGROUPS, T, DEPTH, STAY>(d, group, shared, problem, offset, lane, place, marks);
    if constexpr (!STAY) {
      sync_named(GROUP_BARRIER + warpgroup, WARPGROUP); // no warp stores the tile before any more
      keep_columns<N>(columns, share, thread);
      sync_named(GROUP_BARRIER + warpgroup, WARPGROUP);
    }
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const auto rows = [&](int r) { return pixel_of(problem, behind(problem, at, r - lane / 8)); };
      store_tile<N, T>(d[part], problem, columns, staged, rows, tile.column * N, lane);
      at = behind(problem, at, 64);
    }
    marks.at(Passed::STORED);
    if constexpr (STAY) {
      begin = moved(problem, begin, apart);
      own = moved(problem, own, apart);
    }
  }
}

template <int N, int PARTS, int WARPGROUPS, class T, int DEPTH>
__device__ __forceinline__ void compute_any(const Group &group, const HaloShared &shared) {
  if constexpr (N <= STAYING_COLUMNS)
    if (group.stay) {
      compute_halo<N, PARTS, WARPGROUPS, T, DEPTH, true>(group, shared);
      return;
    }
  compute_halo<N, PARTS, WARPGROUPS, T, DEPTH, false>(group, shared);
}

// Of each thread that multiplies: what the block gets, less 40 of each of the first warpgroup.
HOST_DEVICE constexpr int halo_registers(int warpgroups) { return warpgroups == 2 ? 232 : warpgroups == 3 ? 152 : 104; }

// By one thread.
template <int WARPGROUPS> __device__ __forceinline__ void init_rings(const Group &group, const HaloShared &shared) {
  for (int i = 0; i < group.stages; ++i) {
    barrier_init(&shared.full[i], 1);
    barrier_init(&shared.empty[i], 4 * WARPGROUPS);
  }
  for (int i = 0; i < HALO_STAGES; ++i) {
    barrier_init(&shared.x_full[i], 1);
    barrier_init(&shared.x_empty[i], 4 * WARPGROUPS);
  }
}

template <int N, int PARTS, int WARPGROUPS, class T>
__global__ void __launch_bounds__(WARPGROUP * (1 + WARPGROUPS), 1) halo(const __grid_constant__ Group group) {
  const HaloShared shared = halo_shared<N, WARPGROUPS>(group);
  if (threadIdx.x == 0) {
    init_rings<WARPGROUPS>(group, shared);
    fence_barrier_init();
  }
  sync_block();
  grid_launch_dependents();
  if (threadIdx.x < WARPGROUP) {
    fewer_registers<40>();
    const int warp = uniform(threadIdx.x / 32);
    if (warp == 0) {
      load_taps<N>(group, shared); // no earlier grid writes weights
    } else if (warp == 1) {
      grid_wait(); // before x is read
      load_rows(group, shared, 64 * PARTS * WARPGROUPS);
    }
    sync_warp();
  } else {
    more_registers<halo_registers(WARPGROUPS)>();
    grid_wait(); // before a residual is read, and before y is written
    if (group.depth == 64)
      compute_any<N, PARTS, WARPGROUPS, T, 64>(group, shared);
    else
      compute_any<N, PARTS, WARPGROUPS, T, 32>(group, shared);
  }
}

} // namespace inception_fast::hopper
