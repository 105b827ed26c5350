// The convolution of halo.cuh whose result nobody needs but a 3x3 maximum of stride 2: both in one launch.
//
// A block computes a band of the pooled map (pooled_schedule.h). Its warpgroups multiply one tile after the other and
// leave results in a ring of rows in shared memory, where the two warps of the first warpgroup that do not load take
// the maxima of three rows and store them. So the larger map never leaves the chip, and at most the three rows at a
// band's end are computed twice. Warpgroups and pooling warps take turns by two barriers a tile: `free`, its part of
// the ring is; `made`, its results are there.
//
// On an H200 242 us for 339 of v3's 3x3 32 to 64 and its maximum, and 297 for 401 of its 80 to 192 (CONTRIBUTING).
#pragma once

#include "halo.cuh"
#include "pooled_schedule.h"

namespace inception_fast::hopper {

constexpr int POOLING_WARPS = 2;

struct PooledShared : HaloShared {
  Barrier *free, *made; // [POOLED_TILES_AHEAD]
};

// The ring of results takes the place of staging memory.
template <int N, int WARPGROUPS> __device__ __forceinline__ PooledShared pooled_shared(const Group &group) {
  PooledShared shared;
  shared.x = dynamic_shared();
  shared.weights = shared.x + HALO_STAGES * group.x_bytes;
  shared.staged = shared.weights + group.stages * stage_bytes(0, N, group.depth);
  shared.columns = shared.staged + group.ring * group.problem[0].pitch * 2 * N;
  shared.full = reinterpret_cast<Barrier *>(shared.columns + WARPGROUPS * columns_bytes(N));
  shared.empty = shared.full + MAX_STAGES;
  shared.x_full = shared.empty + MAX_STAGES;
  shared.x_empty = shared.x_full + HALO_STAGES;
  shared.free = shared.x_empty + HALO_STAGES;
  shared.made = shared.free + POOLED_TILES_AHEAD;
  return shared;
}

template <int N> __device__ __forceinline__ uint32_t result_address(uint32_t results, int position, int group) {
  return results + 16 * result_place<N>(position, group);
}

// The larger of each two of 8 numbers; NaN of either is the result.
template <class T> __device__ __forceinline__ uint4 larger_of_8(uint4 a, uint4 b) {
  return make_uint4(larger_pair<T>(a.x, b.x), larger_pair<T>(a.y, b.y), larger_pair<T>(a.z, b.z),
                    larger_pair<T>(a.w, b.w));
}

// The maxima of a line from the window `first` to the one ahead of `last`, 8 columns of them: to memory from `to` on,
// `pitch` bytes apart. `row` has the places of the line's rows in the ring. The values of two windows are on their way
// together: a window's instructions are fewer than the cycles that it waits for them.
template <int N, class T>
__device__ __forceinline__ void pool_windows(const Problem &problem, uint32_t results, const int (&row)[WINDOW],
                                             uint64_t to, uint32_t pitch, uint32_t relu, int first, int last,
                                             int group) {
  constexpr int AT_ONCE = 2;
  const auto load = [&](uint4(&value)[WINDOW], int column) {
#pragma unroll
    for (int i = 0; i < WINDOW; ++i)
      value[i] = load_shared_16(result_address<N>(results, row[i] + column, group));
  };
  const auto largest = [](const uint4(&value)[WINDOW]) {
    return larger_of_8<T>(larger_of_8<T>(value[0], value[1]), value[2]);
  };
  uint4 ahead[WINDOW];
  load(ahead, window_column(problem, first, 0));
  uint4 left = largest(ahead);
#pragma unroll 1
  for (int w = first; w < last; w += AT_ONCE) {
    uint4 value[AT_ONCE][2][WINDOW]; // of the windows' middle and right columns
#pragma unroll
    for (int i = 0; i < 2 * AT_ONCE; ++i)
      load(value[i / 2][i % 2], window_column(problem, lesser(w + i / 2, last - 1), 1 + i % 2));
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const uint4 middle = largest(value[i][0]), right = largest(value[i][1]);
      const uint4 y = larger_of_8<T>(larger_of_8<T>(left, middle), right);
      store_global_16_if(
          w + i < last, reinterpret_cast<void *>(to + static_cast<uint64_t>(static_cast<uint32_t>(w + i)) * pitch),
          make_uint4(relu_pair(y.x, relu), relu_pair(y.y, relu), relu_pair(y.z, relu), relu_pair(y.w, relu)));
      left = right;
    }
  }
}

// Lets the warpgroups store the tiles that may be, from the one numbered `allowed` on, where `line` is the next one.
__device__ __forceinline__ void allow_tiles(const PooledShared &shared, const Problem &problem, const Band &band,
                                            const Line &line, int positions, int ring, int made, int &allowed) {
  const int free = free_position(problem, band, line, positions, made);
  for (; allowed < band.tiles && may_store(problem, allowed, positions, free, ring); ++allowed)
    if (threadIdx.x % 32 == 0)
      barrier_arrive(&shared.free[allowed % POOLED_TILES_AHEAD]);
}

// One of the pooling warps, number `warp` of them: its part of each line of the band.
template <int N, class T>
__device__ void pool_lines(const Group &group, const PooledShared &shared, const Band &band, int positions, int warp) {
  constexpr int GROUPS = N / 8, RUNS = 32 / GROUPS, ALL = RUNS * POOLING_WARPS; // runs of windows, a group a lane
  const Problem &problem = group.problem[0];
  const int lane = threadIdx.x % 32, own = lane % GROUPS, run = warp * RUNS + lane / GROUPS;
  const int column = band.column * N + 8 * own, ring = group.ring, pitch = problem.pitch;
  const uint32_t results = shared_address(shared.staged);
  const bool stores = lane < RUNS * GROUPS && column < problem.oc;
  const int output = stores ? output_of(problem, column) : 0;
  const int first = run * problem.pooled_w / ALL, last = stores ? (run + 1) * problem.pooled_w / ALL : first;
  const uint32_t apart = 2 * static_cast<uint32_t>(problem.output[output].pitch);
  const uint32_t relu = problem.output[output].relu ? 0xffffffffu : 0;
  grid_wait(); // before y is written
  Line line = band.line;
  int made = 0, allowed = 0, place = 0; // the last is that of the line's first row in the ring
  Marks marks(4 + warp, blockIdx.x == 0 && lane == 0);
  allow_tiles(shared, problem, band, line, positions, ring, made, allowed);
  for (int i = 0; i < band.lines; ++i) {
    const int top = line.row - band.line.row, bottom = line.last - band.line.row;
    const int end = (bottom * pitch + line_end(problem) - 1) / positions;
    marks.at(Passed::TILE);
    while (made <= end) {
      barrier_wait(&shared.made[made % POOLED_TILES_AHEAD], made / POOLED_TILES_AHEAD & 1);
      ++made;
      allow_tiles(shared, problem, band, line, positions, ring, made, allowed);
    }
    const auto placed = [&](int behind) { return (place + behind - (place + behind < ring ? 0 : ring)) * pitch; };
    marks.at(Passed::TURN);
    const int row[WINDOW] = {placed(0), placed(lesser(1, bottom - top)), placed(bottom - top)};
    if (first < last)
      pool_windows<N, T>(
          problem, results, row,
          element_address(problem, output, (line.image * problem.pooled_h + line.h) * problem.pooled_w, column), apart,
          relu, first, last, own);
    sync_warp(); // all lanes have read
    marks.at(Passed::STORED);
    line = next_line(problem, line);
    for (place += line.row - band.line.row - top; place >= ring;) // without a division
      place -= ring;
    allow_tiles(shared, problem, band, line, positions, ring, made, allowed);
  }
}

// A warp's 16 rows of sums, N columns, to the ring; `position` is the place there of row lane % 16.
template <int N, class T>
__device__ __forceinline__ void store_results(const float (&d)[N / 2], const Problem &problem, uint32_t columns,
                                              uint32_t results, int position, int lane) {
  constexpr int AT_ONCE = 4; // groups of 8 columns whose scales are on their way together
#pragma unroll
  for (int at = 0; at < N / 8; at += AT_ONCE) {
    uint32_t low[AT_ONCE], high[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      finish<T, false>(&d[(at + i) * 4], columns + 64 * (at + i) + 16 * (lane % 4), problem.residual_scale, 0, 0, lane,
                       low[i], high[i]);
#pragma unroll
    for (int i = 0; i < AT_ONCE; i += 2)
      store_matrices(result_address<N>(results, position, at + i + lane / 16), low[i], high[i], low[i + 1],
                     high[i + 1]);
  }
}

// The consumers.
template <int N, int PARTS, int WARPGROUPS, class T, int DEPTH, bool STAY>
__device__ __forceinline__ void compute_pooled(const Group &group, const PooledShared &shared, const Band &band) {
  constexpr int POSITIONS = 64 * PARTS * WARPGROUPS;
  const Problem &problem = group.problem[0];
  const int warpgroup = uniform(threadIdx.x / WARPGROUP) - 1;
  const int thread = threadIdx.x % WARPGROUP, lane = thread % 32, warp = thread / 32;
  const uint32_t columns = shared_address(shared.columns) + warpgroup * columns_bytes(N);
  const uint32_t results = shared_address(shared.staged);
  HaloPlace place{{0, 0}, {0, 0}, 0, -1, -1};
  Marks marks(2 + warpgroup, blockIdx.x == 0 && thread == 0);
  if constexpr (STAY) {
    keep_all<N>(group, shared, columns, warpgroup, thread);
  } else {
    keep_columns<N>(columns, load_columns<N>(problem, band.column * N, thread), thread);
    sync_named(GROUP_BARRIER + warpgroup, WARPGROUP);
  }
  if (warpgroup < WARPGROUPS / 2)
    place.lead = halo_lead(problem, group.stages);
  else
    sync_named(GROUP_BARRIER + WARPGROUPS, WARPGROUPS * WARPGROUP);
  const int mine = warpgroup * 64 * PARTS, ring = group.ring * problem.pitch;
  int begin = 0, position = mine + warp * WARP_ROWS + lane % WARP_ROWS; // of a tile in its first row; of a row of sums
  for (int tile = 0; tile < band.tiles; ++tile) {
    marks.at(Passed::TILE);
    float d[PARTS][N / 2];
    multiply_halo<N, PARTS, WARPGROUPS, T, DEPTH, STAY>(d, group, shared, problem, begin + mine, lane, place, marks);
    begin = (begin + POSITIONS) % problem.pitch;
    barrier_wait(&shared.free[tile % POOLED_TILES_AHEAD], tile / POOLED_TILES_AHEAD & 1);
    marks.at(Passed::TURN);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const int at = position + 64 * part;
      store_results<N, T>(d[part], problem, columns, results, at < ring ? at : at - ring, renewed(lane));
    }
    position += POSITIONS;
    position -= position >= ring ? ring : 0;
    sync_warp();
    if (lane == 0)
      barrier_arrive(&shared.made[tile % POOLED_TILES_AHEAD]);
    marks.at(Passed::STORED);
  }
}

template <int N, int PARTS, int WARPGROUPS, class T, int DEPTH>
__device__ __forceinline__ void compute_any_pooled(const Group &group, const PooledShared &shared, const Band &band) {
  if constexpr (N <= STAYING_COLUMNS)
    if (group.stay) {
      compute_pooled<N, PARTS, WARPGROUPS, T, DEPTH, true>(group, shared, band);
      return;
    }
  compute_pooled<N, PARTS, WARPGROUPS, T, DEPTH, false>(group, shared, band);
}

// One of the four warps that do not multiply.
template <int N, class T>
__device__ void serve_pooled(const Group &group, const PooledShared &shared, const Band &band, int positions) {
  const Problem &problem = group.problem[0];
  const int warp = uniform(threadIdx.x / 32);
  if (warp == 0) {
    Place place{0, 1}; // no earlier grid writes weights
    for (int tile = 0; tile < (group.stay ? 1 : band.tiles); ++tile)
      load_tile_taps<N>(group, shared, group.weights[0], problem, band.column * N, place);
  } else if (warp == 1) {
    grid_wait(); // before x is read
    Place place{0, 1};
    Marks marks(0, blockIdx.x == 0 && threadIdx.x % 32 == 0);
    for (int tile = 0; tile < band.tiles; ++tile) {
      marks.at(Passed::TILE);
      const Rows rows = rows_from(problem, band.line.row * problem.pitch + tile * positions, positions);
      load_tile_rows(group, shared, group.x[0], problem, rows, place, marks);
      marks.spent();
      marks.at(Passed::END);
    }
  } else {
    pool_lines<N, T>(group, shared, band, positions, warp - 2);
  }
  sync_warp();
}

// Of each thread: of the first warpgroup, and of those that multiply. Together they are what the block gets.
constexpr int SERVING_REGISTERS = 72;
HOST_DEVICE constexpr int pooled_registers(int warpgroups) { return warpgroups == 2 ? 216 : 144; }
HOST_DEVICE constexpr bool pooled_registers_suffice(int warpgroups) {
  const int all = 1 + warpgroups, given = 65536 / (all * WARPGROUP) / 8 * 8;
  return SERVING_REGISTERS + warpgroups * pooled_registers(warpgroups) <= all * given;
}

// Blocks are bands of each column of tiles.
template <int N, int PARTS, int WARPGROUPS, class T>
__global__ void __launch_bounds__(WARPGROUP * (1 + WARPGROUPS), 1) pooled(const __grid_constant__ Group group) {
  static_assert(pooled_registers_suffice(WARPGROUPS), "a warpgroup that asks for more waits for ever");
  constexpr int POSITIONS = 64 * PARTS * WARPGROUPS;
  const PooledShared shared = pooled_shared<N, WARPGROUPS>(group);
  if (threadIdx.x == 0) {
    init_rings<WARPGROUPS>(group, shared);
    for (int i = 0; i < POOLED_TILES_AHEAD; ++i) {
      barrier_init(&shared.free[i], POOLING_WARPS);
      barrier_init(&shared.made[i], 4 * WARPGROUPS);
    }
    fence_barrier_init();
  }
  sync_block();
  grid_launch_dependents();
  const Band band = band_of(group.problem[0], blockIdx.x, gridDim.x / group.problem[0].column_tiles, POSITIONS);
  if (threadIdx.x < WARPGROUP) {
    fewer_registers<SERVING_REGISTERS>();
    serve_pooled<N, T>(group, shared, band, POSITIONS);
  } else {
    more_registers<pooled_registers(WARPGROUPS)>();
    if (group.depth == 64)
      compute_any_pooled<N, PARTS, WARPGROUPS, T, 64>(group, shared, band);
    else
      compute_any_pooled<N, PARTS, WARPGROUPS, T, 32>(group, shared, band);
  }
}

} // namespace inception_fast::hopper
