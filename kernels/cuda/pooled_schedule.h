// Which windows of a 3x3 maximum of stride 2 a block computes behind its convolution, and in which memory the rows
// between the two lie. Plain arithmetic that the kernel, its host side and the tests share.
//
// Windows begin at the first pixel of the convolution's map and end with it at the latest: those of the last row and
// column may be clipped. A row of windows of an image is a line; the lines of all images are shared out evenly, and a
// block's band of them, for one column of tiles, is one run of positions of the padded map (halo_schedule.h): tile
// after tile, those of a line's next rows behind those of its first.
//
// Results go to a ring of rows of the padded map in shared memory, positions without an output as well. A line takes
// three of them, and leaves the first two free.
#pragma once

#include "conv_sizes.h"
#include "halo_schedule.h"

namespace inception_fast::hopper {

constexpr int WINDOW = 3, WINDOW_STEP = 2;

// A line's three rows, counted through all padded images; the last may be the second's again, or the first's.
struct Line {
  int image, h; // of the pooled map
  int row, last;
};

struct Band {
  int column;       // of tiles
  Line line;        // its first
  int lines, tiles; // how many
};

HOST_DEVICE int lesser(int a, int b) { return a < b ? a : b; }

HOST_DEVICE Line line_at(const Problem &problem, int image, int h) {
  const int top = image * problem.image_rows, row = WINDOW_STEP * h;
  return {image, h, top + row, top + lesser(row + WINDOW - 1, problem.oh - 1)};
}

HOST_DEVICE Line next_line(const Problem &problem, const Line &line) {
  return line.h + 1 < problem.pooled_h ? line_at(problem, line.image, line.h + 1) : line_at(problem, line.image + 1, 0);
}

// Column of the convolution's map that a window of the row begins `ahead` of, or the last one.
HOST_DEVICE int window_column(const Problem &problem, int w, int ahead) {
  return lesser(WINDOW_STEP * w + ahead, problem.ow - 1);
}

// Positions from a row's first on up to the last that its windows read, of the padded map.
HOST_DEVICE int line_end(const Problem &problem) {
  return window_column(problem, problem.pooled_w - 1, WINDOW - 1) + 1;
}

// What a block computes, of `bands` for each column of tiles.
HOST_DEVICE Band band_of(const Problem &problem, int block, int bands, int positions) {
  const int all = problem.pixels / problem.image_pixels * problem.pooled_h;
  const int at = block / problem.column_tiles, each = all / bands, more = all - each * bands;
  const int first = at * each + lesser(at, more), lines = each + (at < more), last = first + lines - 1;
  const Line line = line_at(problem, first / problem.pooled_h, first % problem.pooled_h);
  const Line end = line_at(problem, last / problem.pooled_h, last % problem.pooled_h);
  const int count = (end.last - line.row) * problem.pitch + line_end(problem);
  return {block % problem.column_tiles, line, lines, ceil_div(count, positions)};
}

// Rows of the ring without which a tile would wait for lines that wait for it.
HOST_DEVICE int least_ring(const Problem &problem, int positions) {
  return ceil_div(positions, problem.pitch) + WINDOW;
}

// Whether a tile may be stored: what it overwrites in the ring lies ahead of the position `free`, counted as tiles are
// from the band's first. Ahead of it nothing is needed any more, and all of it has been stored: rows that no window
// reads as well, or a warp that is late with them would overwrite what another has stored since.
HOST_DEVICE bool may_store(const Problem &problem, int tile, int positions, int free, int ring) {
  return (tile + 1) * positions <= free + ring * problem.pitch;
}

// Where `free` is when a line is to be pooled next, and `made` tiles have been stored.
HOST_DEVICE int free_position(const Problem &problem, const Band &band, const Line &line, int positions, int made) {
  return lesser((line.row - band.line.row) * problem.pitch, made * positions);
}

// The 16 bytes of 8 columns of a position in the ring, in units of those: rotated, so that neither the same columns of
// eight positions nor all columns of one meet in a bank.
template <int N> HOST_DEVICE constexpr int result_place(int position, int group) {
  static_assert(N % 32 == 0, "whole groups of four");
  return position * (N / 8) + (group ^ (N % 64 == 0 ? position & 7 : position >> 1 & 3));
}

} // namespace inception_fast::hopper
