// The walk's table: jobs, and the tiles that each block computes, in order. Shared by the kernel, its host side and the
// tests.
#pragma once

#include "conv_sizes.h"
#include "halo_schedule.h"
#include "schedule.h"
#include "walk_api.h"

namespace inception_fast::hopper {

constexpr int WALK_COLUMNS[] = {32, 64}; // of tiles
constexpr int WALK_WIDEST = 64;
constexpr int WALK_ROWS = 64, WALK_DEPTH = 64;
constexpr int WALK_STEPS = 2;  // of K that a stage holds, one behind the other: x of both, then weights of both
constexpr int WALK_STAGES = 6; // as many bytes on their way as memory's latency asks for
constexpr int WALK_X_BYTES = 2 * WALK_ROWS * WALK_DEPTH; // of a step
constexpr int WALK_WEIGHTS = WALK_STEPS * WALK_X_BYTES;  // where the weights of a stage begin
constexpr int WALK_STAGE_BYTES = WALK_WEIGHTS + WALK_STEPS * 2 * WALK_WIDEST * WALK_DEPTH;
constexpr int X_WARPS = 3, WEIGHT_WARPS = 3; // that bring these; divide the stages
constexpr int WALK_PRODUCERS = 256;          // threads that multiply nothing
constexpr int CONSUMER_WARPS = 4 * consumers(TURNS);
constexpr int WALK_THREADS = WALK_PRODUCERS + 32 * CONSUMER_WARPS;
constexpr int WALK_SLOTS = 4;     // units whose description a block holds
constexpr int POOL_THREADS = 128; // that compute a unit of a pool, each an item of 8 channels of a pixel
constexpr int POOL_LANES = 8;     // that share an item whose window is large
constexpr int POOL_LARGE = 16;    // windows of more elements are

// What a block is told of a job. Counters of jobs lie side by side; a job has ended when its own is `ended`.
struct alignas(16) Body {
  int32_t kind, columns, ahead, halo, needs;
  int32_t index; // of the job
  int32_t box;   // rows of x that a copy of a halo tile brings
  int32_t need[HOPPER_NEEDS];
  uint32_t ended[HOPPER_NEEDS]; // what the counters of those jobs are then
  Problem problem;
  HopperPool pool;
};

// A tile of a job's problem, or the piece number `tile.row` of a pool; `tile.problem` is the job.
struct alignas(64) Unit {
  Tile tile;
  Corner corner;
  Step step; // the first one, and its tap along h and w
  int32_t tap_h, tap_w;
  int32_t stages;       // that it fills
  int32_t rows, offset; // of halo tiles: the corner's row of x and those below it; the first position in it
};

// One unit with its job, as a block holds them in shared memory.
struct Slot {
  Unit unit;
  Body body;
};

static_assert(sizeof(Unit) == 64 && sizeof(Body) % 16 == 0, "copied 16 bytes at a time");

// Taps whose weights of a chunk of channels fill a stage of a halo tile.
HOST_DEVICE constexpr int walk_taps(int columns) { return WALK_STAGE_BYTES / (2 * WALK_DEPTH * columns); }

// Pixels of the padded map that a stage holds.
constexpr int WALK_PIXELS = WALK_STAGE_BYTES / (2 * WALK_DEPTH);

HOST_DEVICE int pool_lanes(const HopperPool &pool) { return pool.kh * pool.kw > POOL_LARGE ? POOL_LANES : 1; }

// Items of a unit.
HOST_DEVICE int pool_items(const HopperPool &pool) { return POOL_THREADS / pool_lanes(pool); }

// Where the window of an output pixel begins, its image, and by how many elements an average divides.
struct Window {
  int n, top, left;
  float divisor;
};

HOST_DEVICE Window window_of(const HopperPool &pool, int pixel) {
  const int column = pixel % pool.ow, rest = pixel / pool.ow;
  const int top = rest % pool.oh * pool.stride_h - pool.top, left = column * pool.stride_w - pool.left;
  const bool padded = pool.kind == HOPPER_POOL_AVERAGE_PADDED;
  const int most_h = pool.h + (padded ? pool.bottom : 0), most_w = pool.w + (padded ? pool.right : 0);
  const int first_h = padded || top > 0 ? top : 0, first_w = padded || left > 0 ? left : 0;
  const int last_h = top + pool.kh < most_h ? top + pool.kh : most_h;
  const int last_w = left + pool.kw < most_w ? left + pool.kw : most_w;
  return {rest / pool.oh, top, left, static_cast<float>((last_h - first_h) * (last_w - first_w))};
}

// The ring, staging memory, columns, slots, barriers of stages and slots, two flags.
constexpr int walk_bytes() {
  return WALK_STAGES * WALK_STAGE_BYTES + CONSUMER_WARPS * STAGED_BYTES + 2 * columns_bytes(WALK_WIDEST) +
         WALK_SLOTS * static_cast<int>(sizeof(Slot)) + 2 * (WALK_STAGES + WALK_SLOTS) * 8 + 8;
}

static_assert(WALK_STAGES % X_WARPS == 0 && WALK_STAGES % WEIGHT_WARPS == 0, "each stage has its warps");
static_assert(ALIGNMENT + walk_bytes() <= SHARED_LIMIT, "a block fits a multiprocessor");

} // namespace inception_fast::hopper
