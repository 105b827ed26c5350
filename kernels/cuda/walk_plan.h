// From jobs, as the C interface states them, to the walk's table: problems, workspaces, and which block computes which
// tiles in which order. Arithmetic without a GPU.
#pragma once

#include <algorithm>
#include <functional>
#include <queue>
#include <string>
#include <utility>
#include <vector>

#include "conv_plan.h"
#include "walk_schedule.h"

namespace inception_fast::hopper {

inline HopperConfig walk_config(int columns, bool halo = false) {
  return {WALK_ROWS, columns, WALK_DEPTH, WALK_STAGES, 1, halo ? HALO : TURNS, 0, 0, ALIGNMENT + walk_bytes()};
}

inline HopperConfig walk_config(const HopperJob &job) { return walk_config(job.columns, job.halo != 0); }

inline int pool_units(const HopperPool &pool) {
  const int64_t items = int64_t{pool.n} * pool.oh * pool.ow * (pool.c / 8);
  return static_cast<int>((items + pool_items(pool) - 1) / pool_items(pool));
}

// Where in the workspace the counters of tiles and the parts of split convolutions lie, behind the counters of jobs.
struct WalkWorkspace {
  int64_t counters = 0, bytes = 0;
  std::vector<int64_t> counter, partial; // of each job
};

inline WalkWorkspace walk_workspace(const HopperJob *jobs, int count) {
  WalkWorkspace found;
  found.counter.resize(count);
  found.partial.resize(count);
  std::vector<int64_t> partials(count);
  int64_t counters = 4 * (int64_t{count} + 1);
  for (int i = 0; i < count; ++i)
    if (jobs[i].kind == HOPPER_JOB_CONV && jobs[i].conv.splits > 1) {
      const Problem problem = problem_of(jobs[i].conv, walk_config(jobs[i]));
      const int64_t tiles = int64_t{problem.row_tiles} * problem.column_tiles;
      counters = (counters + 15) / 16 * 16;
      found.counter[i] = counters;
      counters += 8 * tiles;
      partials[i] = 4 * tiles * jobs[i].conv.splits * WALK_ROWS * jobs[i].columns;
    }
  found.bytes = found.counters = (counters + 255) / 256 * 256;
  for (int i = 0; i < count; ++i) {
    found.partial[i] = found.bytes;
    found.bytes += (partials[i] + 255) / 256 * 256;
  }
  return found;
}

inline Problem walk_problem(const HopperJob &job) {
  Problem problem = problem_of(job.conv, walk_config(job));
  problem.first_unit = 0;
  return problem;
}

// Most rows of x that a halo tile of the job reads.
inline int halo_rows(const Problem &problem) {
  int most = 0;
  for (int tile = 0; tile < problem.row_tiles; ++tile)
    most = std::max(most, rows_of(problem, tile, WALK_ROWS).count);
  return most;
}

// Rows that a copy brings: of a single image all that a tile may read, since those below it are zeros; of several, in
// which another image may begin below any row, one.
inline int halo_box(const HopperJob &job) { return job.halo && job.conv.n == 1 ? halo_rows(walk_problem(job)) : 1; }

// Pieces, or tiles that are stored, of which each counts once towards the job's end.
inline uint32_t ended_at(const HopperJob &job) {
  if (job.kind == HOPPER_JOB_POOL)
    return pool_units(job.pool);
  const Problem problem = walk_problem(job);
  return static_cast<uint32_t>(problem.row_tiles) * problem.column_tiles;
}

// What a block is told of each job. `workspace` is its address, with the counters of jobs at its beginning.
inline std::vector<Body> walk_bodies(const HopperJob *jobs, int count, uint64_t workspace) {
  const WalkWorkspace places = walk_workspace(jobs, count);
  std::vector<Body> bodies(count);
  for (int i = 0; i < count; ++i) {
    Body &body = bodies[i];
    body.kind = jobs[i].kind;
    body.columns = jobs[i].columns;
    body.ahead = jobs[i].ahead;
    body.halo = jobs[i].halo;
    body.box = jobs[i].kind == HOPPER_JOB_CONV ? halo_box(jobs[i]) : 0;
    body.index = i;
    body.needs = jobs[i].needs;
    for (int j = 0; j < jobs[i].needs; ++j) {
      body.need[j] = jobs[i].need[j];
      body.ended[j] = ended_at(jobs[jobs[i].need[j]]);
    }
    if (body.kind == HOPPER_JOB_POOL) {
      body.pool = jobs[i].pool;
    } else {
      body.problem = walk_problem(jobs[i]);
      body.problem.counter = workspace + places.counter[i];
      body.problem.partial = workspace + places.partial[i];
    }
  }
  return bodies;
}

// What a tile whose rows of x stay is told in place of its first pixel's window.
inline void fill_halo(Unit &unit, const Problem &problem, int columns) {
  const Rows rows = rows_of(problem, unit.tile.row, WALK_ROWS);
  const int image = rows.first / problem.image_rows;
  unit.corner = {image, rows.first - image * problem.image_rows - problem.top, -problem.left};
  unit.rows = rows.count;
  unit.offset = rows.offset;
  unit.stages = problem.chunks * (1 + ceil_div(problem.taps, walk_taps(columns)));
}

// All units of a job. Where each tile begins is said here, since a division on the device takes long.
inline std::vector<Unit> units_of(const HopperJob &job, int index) {
  std::vector<Unit> units;
  if (job.kind == HOPPER_JOB_POOL) {
    for (int i = 0; i < pool_units(job.pool); ++i) {
      units.emplace_back();
      units.back().tile = {index, i, 0, 0, 0, 0};
    }
    return units;
  }
  const Problem problem = walk_problem(job);
  for (int i = 0; i < problem.units; ++i) {
    Unit unit{};
    unit.tile = tile_of(&problem, i, 1, 0);
    unit.tile.problem = index;
    unit.stages = ceil_div(unit.tile.last - unit.tile.first, WALK_STEPS); // the last may be filled in part
    if (job.halo)
      fill_halo(unit, problem, job.columns);
    else
      unit.corner = corner_of(problem, unit.tile.row, WALK_ROWS);
    unit.step = step_of(problem, unit.tile.first);
    unit.tap_h = unit.step.tap / problem.kw;
    unit.tap_w = unit.step.tap % problem.kw;
    units.push_back(unit);
  }
  return units;
}

// Microseconds by a model, for who does what: how long a unit keeps its block busy, and how long until its result is
// seen by others.
struct UnitCost {
  double busy, seen;
};

inline UnitCost unit_cost(const HopperJob &job, const Unit &unit) {
  if (job.kind == HOPPER_JOB_POOL)
    return {1.5, 3.0};
  const double steps = unit.tile.last - unit.tile.first;
  const double step = job.columns == 32 ? 0.08 : 0.1;
  return {steps * step, job.conv.splits > 1 ? 4.5 : 2.3};
}

// The blocks' lists. Units go, in the order of jobs, to the block that is idle first.
inline std::vector<std::vector<Unit>> walk_lists(const HopperJob *jobs, int count, int blocks) {
  std::vector<std::vector<Unit>> lists(blocks);
  using Idle = std::pair<double, int>;
  std::priority_queue<Idle, std::vector<Idle>, std::greater<Idle>> idle;
  for (int i = 0; i < blocks; ++i)
    idle.push({0.0, i});
  std::vector<double> ended(count);
  for (int i = 0; i < count; ++i) {
    double start = 0;
    for (int j = 0; j < jobs[i].needs; ++j)
      start = std::max(start, ended[jobs[i].need[j]]);
    for (const Unit &unit : units_of(jobs[i], i)) {
      const UnitCost cost = unit_cost(jobs[i], unit);
      const Idle first = idle.top();
      idle.pop();
      const double end = std::max(start, first.first) + cost.busy;
      ended[i] = std::max(ended[i], end + cost.seen);
      lists[first.second].push_back(unit);
      idle.push({end, first.second});
    }
  }
  return lists;
}

std::vector<std::string> walk_reasons(const HopperJob *jobs, int count, int type);

} // namespace inception_fast::hopper
