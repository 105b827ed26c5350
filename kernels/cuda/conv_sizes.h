// The tiles that the convolution is compiled for, and how they share a multiprocessor's memory.
#pragma once

#include "schedule.h"

namespace inception_fast::hopper {

// Columns of a tile: Inception's channels, or their halves and quarters. Multiples of 16, so that a cluster's blocks
// load whole groups of 8 rows of weights.
constexpr int TILE_COLUMNS[] = {32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256};

constexpr int WARPGROUP = 128; // threads

// Ways in which a block's warpgroups share tiles: two halve one of 128 rows; two take tiles of 64 rows in turn, so that
// one multiplies while the other stores; two and two take tiles of 128 rows in turn, which ask for fewer operands a
// product: 112 registers each leave room for so many columns, and none for a residual. BEHIND is HALVES whose results
// wait in shared memory, from where two more warps store them while the next tile multiplies; a residual comes there
// ahead of them.
constexpr int HALVES = 0, TURNS = 1, TWOS = 2, BEHIND = 3;
constexpr int TWOS_COLUMNS[] = {96, 112, 128};
constexpr int BEHIND_COLUMNS[] = {96, 128, 160, 192, 224, 256};

HOST_DEVICE constexpr int tile_rows(int way) { return way == TURNS ? 64 : 128; }
HOST_DEVICE constexpr int consumers(int way) { return way == TWOS ? 4 : 2; } // warpgroups that multiply
HOST_DEVICE constexpr int way_of(int rows, int turns, int behind) {
  return behind ? BEHIND : turns == 0 ? HALVES : rows == 64 ? TURNS : TWOS;
}

// Halo tiles: columns, and 64 positions this many times of each of so many warpgroups. The more there are, the fewer
// registers each has, and the more of them multiply while one stores.
struct HaloTile {
  int columns, parts, warpgroups;
};
constexpr HaloTile HALO_TILES[] = {{32, 4, 2},  {48, 4, 2},  {64, 4, 2}, {64, 2, 2},  {96, 3, 2}, {96, 2, 2},
                                   {128, 2, 2}, {192, 1, 2}, {64, 2, 3}, {128, 1, 3}, {32, 2, 4}, {48, 2, 4}};

HOST_DEVICE constexpr int halo_positions(const HaloTile &tile) { return 64 * tile.parts * tile.warpgroups; }

// Halo tiles whose results are pooled.
constexpr HaloTile POOLED_TILES[] = {{64, 2, 2}, {64, 4, 2}, {96, 2, 2}, {192, 1, 2}};

constexpr int POOLED_TILES_AHEAD = 16; // of a block's tiles fewer are stored, or may be, and not yet pooled

constexpr int MAX_STAGES = 12;
constexpr int WARP_ROWS = 16;
constexpr int STAGED_COLUMNS = 64; // columns that a warp stores at a time
constexpr int STAGED_BYTES = WARP_ROWS * STAGED_COLUMNS * 2;
constexpr int ALIGNMENT = 1024;          // of the ring, by the largest swizzle
constexpr int SHARED_LIMIT = 227 * 1024; // of a block on sm_90

HOST_DEVICE constexpr int stage_bytes(int rows, int columns, int depth) { return 2 * depth * (rows + columns); }

// What a warpgroup keeps of the columns of its tile: scale and shift, and 16 bytes about each 8 of them.
HOST_DEVICE constexpr int columns_bytes(int columns) { return 8 * columns + 2 * columns; }

// Staging memory of a warpgroup: four warps' of one part of 64 columns, or of all parts of its tile.
HOST_DEVICE constexpr int staged_parts(int way, int columns) {
  return way == BEHIND ? (columns + STAGED_COLUMNS - 1) / STAGED_COLUMNS : 1;
}
HOST_DEVICE constexpr int staged_bytes(int way, int columns) { return staged_parts(way, columns) * 4 * STAGED_BYTES; }

// The ring, the warpgroups' staging memory and columns, two barriers a stage and a warpgroup, a flag each.
HOST_DEVICE constexpr int shared_bytes(int way, int columns, int depth, int stages) {
  return stages * stage_bytes(tile_rows(way), columns, depth) +
         consumers(way) * (staged_bytes(way, columns) + columns_bytes(columns) + 2 * 8 + 4) + 2 * MAX_STAGES * 8;
}

HOST_DEVICE constexpr int ring_stages(int way, int columns, int depth) {
  const int fit =
      (SHARED_LIMIT - ALIGNMENT - shared_bytes(way, columns, depth, 0)) / stage_bytes(tile_rows(way), columns, depth);
  return fit < MAX_STAGES ? fit : MAX_STAGES;
}

// What halo tiles have of shared memory beside rows of x and weights: staging memory, columns, two barriers a stage.
HOST_DEVICE constexpr int halo_bytes(int columns, int warpgroups) {
  return warpgroups * (4 * STAGED_BYTES + columns_bytes(columns)) + 2 * (MAX_STAGES + 2) * 8;
}

// The same of those that are pooled, beside rows of results: columns, two barriers a stage, two a tile that waits.
HOST_DEVICE constexpr int pooled_bytes(int columns, int warpgroups) {
  return warpgroups * columns_bytes(columns) + 2 * (MAX_STAGES + 2 + POOLED_TILES_AHEAD) * 8;
}

} // namespace inception_fast::hopper
