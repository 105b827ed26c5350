// Which rows of x a halo tile needs, and which pixels of y its positions are. Plain arithmetic that the kernel, its
// host side and the tests share.
//
// The map is walked with its padding: a row has `pitch` pixels, at least ow + kw - 1, an image oh + kh - 1 rows, and
// the images lie below each other. A position is a pixel of that map, and the output whose window begins there, where
// there is one: so a tap shifts all positions alike, by (tap / kw) * pitch + tap % kw. A tile is a run of positions,
// and what it reads are whole rows: those of its first position up to its last one's at the last tap.
#pragma once

#include "schedule.h"

namespace inception_fast::hopper {

constexpr int HALO = 2;             // from this on HopperConfig::turns says how many warpgroups share such a tile
constexpr int STAYING_COLUMNS = 64; // most columns of a tile whose weights may stay
constexpr int HALO_STAGES = 2;      // of rows of x
constexpr int HALO_PITCH = 256;     // most pixels of a row: the box of a tensor map

HOST_DEVICE constexpr bool is_halo(int turns) { return turns >= HALO; }

// First row of x that a tile needs, how many, and the tile's first position in the first of them.
struct Rows {
  int first, count, offset;
};

// Of the tile that begins at a position.
HOST_DEVICE Rows rows_from(const Problem &problem, int begin, int positions) {
  const int first = begin / problem.pitch, last = (begin + positions - 1 + problem.last_tap) / problem.pitch;
  return {first, last - first + 1, begin - first * problem.pitch};
}

HOST_DEVICE Rows rows_of(const Problem &problem, int row_tile, int positions) {
  return rows_from(problem, row_tile * positions, positions);
}

// Whether all tiles use the same weights and `stages` stages hold them all: then they are loaded once a block. Read
// again by every block for each tile, the few lines of narrow weights are what their part of L2 cannot deliver.
HOST_DEVICE bool weights_stay(const Problem *problems, int count, int stages) {
  return count == 1 && problems[0].column_tiles == 1 && problems[0].taps * problems[0].chunks <= stages;
}

// Taps that half of the warpgroups go ahead of the others: up to half a tile, as far as both rings let it.
HOST_DEVICE int halo_lead(const Problem &problem, int stages) {
  const int half = (problem.taps * problem.chunks + 1) / 2, rows = problem.taps * HALO_STAGES;
  const int most = rows < stages - 1 ? rows : stages - 1;
  return half < most ? half : most;
}

// Where a position lies on the padded maps.
struct Position {
  int image, h, w;
};

HOST_DEVICE Position position_at(const Problem &problem, int position) {
  const int row = position / problem.pitch, image = row / problem.image_rows;
  return {image, row - image * problem.image_rows, position - row * problem.pitch};
}

// The position `ahead` behind another: without a division, and for rows wider than that with at most one step.
HOST_DEVICE Position behind(const Problem &problem, Position at, int ahead) {
  for (at.w += ahead; at.w >= problem.pitch; at.w -= problem.pitch)
    if (++at.h == problem.image_rows) {
      at.h = 0;
      ++at.image;
    }
  return at;
}

// The position as far behind another as `by` is behind the first: without a division, and without a loop.
HOST_DEVICE Position moved(const Problem &problem, const Position &at, const Position &by) {
  Position to{at.image + by.image, at.h + by.h, at.w + by.w};
  if (to.w >= problem.pitch) {
    to.w -= problem.pitch;
    ++to.h;
  }
  if (to.h >= problem.image_rows) {
    to.h -= problem.image_rows;
    ++to.image;
  }
  return to;
}

// The pixel of y at a position, or -1 where there is none.
HOST_DEVICE int pixel_of(const Problem &problem, const Position &at) {
  const int pixel = at.image * problem.image_pixels + at.h * problem.ow + at.w;
  return at.w < problem.ow && at.h < problem.oh && pixel < problem.pixels ? pixel : -1;
}

} // namespace inception_fast::hopper
