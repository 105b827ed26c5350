// How the threads of a call share out a convolution. No value depends on it.
//
// Groups of threads take ranges of tiles, and the threads of a group share out the products of its tiles by the
// vectors of the panels, panel by panel. Each of them reads, and for Winograd's algorithm transforms, all tiles of the
// group, and its own part of the weights: many groups read weights more often, few groups x.
//
// Where tiles suffice, each thread takes a range of its own, and of the tile at its end as many panels as make all
// ranges equal. Lines of a map that two cores have read cost both of them when one writes there again: on a Zen 4 7 ns
// each, one after the other, 28 where the cores share no cache, for 1 and 3 of a line that one of them alone has.
#pragma once

#include "spec.h"

namespace inception_fast::cpu {
namespace {

struct Part {
  int64_t tile0, tile1; // that this thread reads
  int64_t low, high;    // its own of the products of tiles by vectors
  int64_t vectors;      // of all panels, where products count from tile to tile of the map; 0: panel by panel of these

  int64_t cut(const Panel &panel, int64_t at) const {
    if (vectors > 0)
      return lesser(tile1, greater(tile0, ceil_div(at - panel.first, vectors)));
    int64_t tiles = tile1 - tile0, inside = ceil_div(at - panel.first * tiles, panel.vectors);
    return tile0 + lesser(tiles, greater(0, inside));
  }
  int64_t begin(const Panel &panel) const { return cut(panel, low); }
  int64_t end(const Panel &panel) const { return cut(panel, high); }
};

inline int64_t vectors_of(const ConvOp &op) {
  const Panel &last = op.panels[op.panel_count - 1];
  return last.first + last.vectors;
}

// The last tile counts as many rows as it has pixels.
inline Part part_by_tiles(const ConvOp &op, const Worker &worker, int64_t tiles) {
  int64_t vectors = vectors_of(op), rows = int64_t(op.n) * op.oh * op.ow * vectors;
  auto at = [&](int64_t thread) {
    return thread < worker.count ? ceil_div(rows * thread / worker.count, Isa::rows) : tiles * vectors;
  };
  int64_t low = at(worker.index), high = at(worker.index + 1);
  return {low / vectors, ceil_div(high, vectors), low, high, vectors};
}

inline Part part_of(const ConvOp &op, const Worker &worker, int64_t tiles, int64_t groups) {
  int64_t count = worker.count, group = worker.index * groups / count;
  int64_t first = ceil_div(group * count, groups), members = ceil_div((group + 1) * count, groups) - first;
  Part part{};
  part.tile0 = tiles * first / count, part.tile1 = tiles * (first + members) / count;
  int64_t units = (part.tile1 - part.tile0) * vectors_of(op), place = worker.index - first;
  part.low = units * place / members, part.high = units * (place + 1) / members;
  return part;
}

// Of threads that have few tiles each: as many groups as there are threads, unless one of few tiles would get 4 % more
// of them than others.
inline int64_t direct_groups(const ConvOp &op, int64_t tiles, int64_t threads) {
  for (int64_t groups = op.by_panel ? 1 : threads; groups > 1; groups /= 2) {
    int64_t members = ceil_div(threads, groups);
    if (25 * ceil_div(tiles * members, threads) * threads <= 26 * tiles * members)
      return groups;
  }
  return 1;
}

inline Part direct_part(const ConvOp &op, const Worker &worker, int64_t tiles) {
  constexpr int64_t ENOUGH = 4; // tiles of a thread for which it may read all weights
  if (tiles >= ENOUGH * worker.count)
    return part_by_tiles(op, worker, tiles);
  return part_of(op, worker, tiles, direct_groups(op, tiles, worker.count));
}

// The fewest multiply-adds of the busiest thread, transforms counted as `winograd.py` does. Products of few tiles wait
// for their weights: below 8 a product takes as long as one of 8.
inline int64_t winograd_groups(const ConvOp &op, int64_t tiles, int64_t threads) {
  constexpr int64_t TALL = 8;
  int64_t high = op.kh + op.tile_h - 1, wide = op.kw + op.tile_w - 1, transform = high * (high > 1) + wide * (wide > 1);
  int64_t vectors = vectors_of(op), best = 1, least = INT64_MAX;
  for (int64_t groups = threads; groups >= 1; groups /= 2) {
    int64_t members = ceil_div(threads, groups), held = ceil_div(tiles * members, threads);
    int64_t tall = greater(1, held * lesser(op.panel_count, members) / members);
    int64_t columns = ceil_div(vectors, members) * Isa::lanes;
    int64_t work = held * (columns * op.c * greater(TALL, tall) / tall + transform * (op.c + columns));
    if (work < least)
      best = groups, least = work;
  }
  return best;
}

} // namespace
} // namespace inception_fast::cpu
