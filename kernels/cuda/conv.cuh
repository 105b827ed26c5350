// y = act(residual + residual_scale * (scale * conv(x, weights) + shift)) for a group of convolutions.
//
// x is [n, h, w, c] and y [n, oh, ow, oc] in T, pixels `pitch` elements apart; weights are [kh * kw][oc][c]. Sums are
// float32, a result is rounded once. K is summed in the order of taps, then channels, whatever the tile; parts of a
// split K are added in their order, so the same launch gives the same bits.
//
// Two warps of the first warpgroup fill a ring of stages by TMA: `rows` windows at one tap, which the unit's im2col
// mode gathers over rows and images and fills up with zeros at the borders, and `N` rows of weights, both 128- or
// 64-byte swizzled. The others multiply, 64 rows each: two of them a tile of 128 (HALVES), or in turn, so that some
// multiply while others store (epilogue.cuh): each a tile of 64 (TURNS), or two and two a tile of 128 (TWOS). Or other
// warps store for them (behind.cuh). In a cluster of two blocks, which compute tiles below each other, each block loads
// half of the weights for both.
#pragma once

#include "behind.cuh"
#include "conv_ring.cuh"
#include "epilogue.cuh"

namespace inception_fast::hopper {

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
  const uint32_t staged = shared_address(shared.staged) + warpgroup * staged_bytes(WAY, N) + warp * STAGED_BYTES;
  const uint32_t columns = shared_address(shared.columns) + warpgroup * columns_bytes(N);
  const int mine = warpgroup / sharers(WAY); // turns, where tiles are taken in turn
  Place place{0, 0};
  int turn = 0;
  Marks marks(2 + warpgroup, blockIdx.x == 0 && thread == 0);
  for (int unit = cluster_index; unit < group.units; unit += clusters, turn ^= 1) {
    const Tile tile = tile_of(group.problem, unit, group.cluster, rank_of(group));
    if (in_turn(WAY) && turn != mine) {
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
    if (in_turn(WAY) && unit != cluster_index)
      sync_named(TURN_BARRIER + mine, consumers(WAY) * WARPGROUP);
    marks.at(Passed::TURN);
    float d[N / 2];
    const bool more = in_turn(WAY) && unit + clusters < group.units;
    const auto meanwhile = [&] {
      if (WAY == HALVES) // where a warp may still store the tile before; else all have met at their turn
        sync_named(GROUP_BARRIER + warpgroup, WARPGROUP);
      keep_columns<N>(columns, share, thread);
      sync_named(GROUP_BARRIER + warpgroup, WARPGROUP);
    };
    multiply<N, WAY, T, DEPTH>(d, group, shared, tile, warpgroup, lane, more, place, marks, [] {}, meanwhile);
    if (tile.row >= problem.row_tiles)
      continue; // the cluster's other block has the last tile
    if (problem.splits > 1 && !add_parts<N, WAY>(d, problem, shared, tile, warpgroup, thread))
      continue;
    store_tile<N, T, WAY == TWOS>(d, problem, columns, staged, rows, tile.column * N, lane);
    marks.at(Passed::STORED);
  }
}

template <int N, int WAY, class T, int DEPTH>
__device__ __forceinline__ void compute_conv(const Group &group, const Shared &shared, int cluster_index,
                                             int clusters) {
  if constexpr (WAY == BEHIND)
    compute_behind<N, T, DEPTH>(group, shared, cluster_index, clusters);
  else
    compute_tiles<N, WAY, T, DEPTH>(group, shared, cluster_index, clusters);
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
    if constexpr (WAY == BEHIND)
      for (int i = 0; i < consumers(WAY); ++i) {
        barrier_init(&shared.ready[i], 1);
        barrier_init(&shared.made[i], 4);
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
    if constexpr (WAY == BEHIND)
      if (warp >= 2)
        store_tiles<N>(group, shared, warp - 2, cluster_index, clusters);
    sync_warp();
  } else {
    more_registers<multiplying_registers(WAY)>();
    grid_wait(); // before a residual is read, and before y or the workspace is written
    if (group.depth == 64)
      compute_conv<N, WAY, T, 64>(group, shared, cluster_index, clusters);
    else
      compute_conv<N, WAY, T, 32>(group, shared, cluster_index, clusters);
  }
  // The other block may still fill this one's stages' barriers: its memory has to outlive that.
  if (group.cluster != 1) {
    cluster_arrive();
    cluster_wait();
  }
}

} // namespace inception_fast::hopper
