// Tiles of conv.cuh that are stored behind the products of the next one (BEHIND).
//
// Two warpgroups halve a tile and leave its results in shared memory, in their own staging memory for all of its
// columns. The two warps of the first warpgroup that do not load store them from there, each for one of the two, and
// bring the next tile's residual to where its results will be, by TMA, in boxes that are swizzled as staged rows are.
// So neither stores nor a residual's way from memory keep anyone from multiplying, for the price of a part of the ring.
// A warpgroup and its storing warp take turns by two barriers: `ready`, staging memory and columns are free, and the
// residual is there; `made`, results are there.
//
// Measured before parts of a residual were asked for one by one: what that should give is expected, by marks of other
// tiles (CONTRIBUTING).
#pragma once

#include "conv_ring.cuh"
#include "epilogue.cuh"

namespace inception_fast::hopper {

static_assert(consumers(BEHIND) == 2, "a warp beside those that load stores for each");

// Parts of 64 columns of a tile's residual, 0 where it has none.
template <int N> __device__ __forceinline__ int residual_parts(const Problem &problem, const Tile &tile) {
  const int left = ceil_div(problem.oc - tile.column * N, STAGED_COLUMNS);
  return !problem.residual ? 0 : left < staged_parts(BEHIND, N) ? left : staged_parts(BEHIND, N);
}

// Stores what warpgroup `warpgroup` of those that multiply has made of its tiles, by one warp, tile after tile. As soon
// as 64 columns are stored, it asks for the next tile's residual in their place; the level 2 cache has been asked for
// it before, while there was nothing to store.
template <int N>
__device__ void store_tiles(const Group &group, const Shared &shared, int warpgroup, int cluster_index, int clusters) {
  constexpr int WAY = BEHIND, PARTS = staged_parts(WAY, N), PART = 4 * STAGED_BYTES;
  const int lane = threadIdx.x % 32, rank = rank_of(group);
  uint8_t *staged = shared.staged + warpgroup * staged_bytes(WAY, N);
  const uint32_t columns = shared_address(shared.columns) + warpgroup * columns_bytes(N);
  Barrier *ready = &shared.ready[warpgroup], *made = &shared.made[warpgroup];
  uint32_t parity = 0;
  Marks marks(4 + warpgroup, blockIdx.x == 0 && lane == 0);
  const auto first_of = [&](const Tile &tile) { return tile.row * tile_rows(WAY) + 64 * warpgroup; };
  const auto bring = [&](const Tile &tile, int part) {
    tma_load(staged + part * PART, &group.residual[tile.problem], ready, tile.column * N + part * STAGED_COLUMNS,
             first_of(tile));
  };
  const auto announce = [&](int parts) { // behind all copies, for it says too that staging memory and columns are free
    if (parts > 0)
      barrier_expect(ready, parts * PART);
    else if (lane == 0)
      barrier_arrive(ready);
  };
  grid_wait(); // before a residual is read, and before y is written
  Tile tile = tile_of(group.problem, cluster_index, group.cluster, rank);
  const int at_first = residual_parts<N>(group.problem[tile.problem], tile);
  for (int part = 0; part < at_first; ++part)
    bring(tile, part);
  announce(at_first);
  for (int unit = cluster_index; unit < group.units; unit += clusters, parity ^= 1) {
    const Problem &problem = group.problem[tile.problem];
    const int first = first_of(tile);
    marks.at(Passed::TILE);
    const bool more = unit + clusters < group.units;
    int parts = 0;
    if (more) {
      tile = tile_of(group.problem, unit + clusters, group.cluster, rank);
      parts = residual_parts<N>(group.problem[tile.problem], tile);
      for (int part = 0; part < parts; ++part)
        tma_prefetch(&group.residual[tile.problem], tile.column * N + part * STAGED_COLUMNS, first_of(tile));
    }
    barrier_wait(made, parity);
    marks.at(Passed::TURN);
#pragma unroll 1
    for (int part = 0; part < PARTS; ++part) {
      store_staged<N>(problem, columns, shared_address(staged), part, first, lane);
      sync_warp(); // all lanes have read what they stored
      if (part < parts) {
        fence_async_shared(); // results lay where the copy writes
        bring(tile, part);
      }
    }
    if (more)
      announce(parts);
    marks.at(Passed::STORED);
  }
}

// The consumers. What the next tile is, and what its columns have in common, is found while products run.
template <int N, class T, int DEPTH>
__device__ __forceinline__ void compute_behind(const Group &group, const Shared &shared, int cluster_index,
                                               int clusters) {
  const int warpgroup = uniform(threadIdx.x / WARPGROUP) - 1;
  const int thread = threadIdx.x % WARPGROUP, lane = thread % 32, warp = thread / 32;
  const uint32_t staged = shared_address(shared.staged) + warpgroup * staged_bytes(BEHIND, N) + warp * STAGED_BYTES;
  const uint32_t columns = shared_address(shared.columns) + warpgroup * columns_bytes(N);
  Place place{0, 0};
  uint32_t parity = 0; // of staging memory
  Marks marks(2 + warpgroup, blockIdx.x == 0 && thread == 0);
  Tile tile = tile_of(group.problem, cluster_index, group.cluster, rank_of(group));
  for (int unit = cluster_index; unit < group.units; unit += clusters, parity ^= 1) {
    const Problem &problem = group.problem[tile.problem];
    marks.at(Passed::TILE);
    float d[N / 2];
    ColumnsShare share;
    Tile next = tile;
    const auto begun = [&] {
      share = load_columns<N>(problem, tile.column * N, thread);
      if (unit + clusters < group.units)
        next = tile_of(group.problem, unit + clusters, group.cluster, rank_of(group));
    };
    const auto meanwhile = [&] {
      barrier_wait(&shared.ready[warpgroup], parity);
      keep_columns<N>(columns, share, thread);
      sync_named(GROUP_BARRIER + warpgroup, WARPGROUP);
    };
    marks.at(Passed::TURN);
    multiply<N, BEHIND, T, DEPTH>(d, group, shared, tile, warpgroup, lane, false, place, marks, begun, meanwhile);
    stage_tile<N, T>(d, problem, columns, staged, lane); // of a tile past the last, too: nobody stores its rows
    sync_warp();
    if (lane == 0)
      barrier_arrive(&shared.made[warpgroup]);
    marks.at(Passed::STORED);
    tile = next;
  }
}

} // namespace inception_fast::hopper
