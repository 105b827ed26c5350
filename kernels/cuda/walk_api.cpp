// The part of the walk's C interface that is arithmetic and needs neither GPU nor driver.
#include <stdexcept>

#include "errors.h"
#include "walk_plan.h"
#include "walk_table.h"

using namespace inception_fast::hopper;

namespace {

constexpr int MOST_JOBS = 1 << 16, MOST_BLOCKS = 1 << 10;

int config_of(int columns) {
  const std::vector<HopperConfig> configs = conv_configs();
  for (size_t i = 0; i < configs.size(); ++i) {
    const HopperConfig &config = configs[i];
    if (config.rows == WALK_ROWS && config.columns == columns && config.depth == WALK_DEPTH && config.cluster == 1)
      return static_cast<int>(i);
  }
  return -1;
}

// A convolution that can run at all, as one whose rows of x stay.
void check_halo(Reasons &reasons, const HopperJob &job) {
  const HopperConv &conv = job.conv;
  reasons.between("rows of a halo tile's stride", conv.stride_h, 1, 1);
  reasons.between("columns of a halo tile's stride", conv.stride_w, 1, 1);
  reasons.between("parts of a halo tile's K", conv.splits, 1, 1);
  reasons.require(!(conv.output[0].relu & HOPPER_FLOAT32), "a halo tile of float32", "16 bits");
  if (!reasons.list.empty())
    return;
  const Problem problem = walk_problem(job);
  // One stage holds x until the last of these is read; where another chunk follows, until its first tap is multiplied,
  // for which its x and its first weights are in the ring as well.
  const bool several = problem.chunks > 1;
  reasons.between(several ? "stages of the taps of a halo tile of several chunks" : "stages of a halo tile's taps",
                  ceil_div(problem.taps, walk_taps(job.columns)), 1, several ? WALK_STAGES - 3 : WALK_STAGES - 1);
  reasons.between("pixels of rows that a halo tile reads", int64_t{halo_rows(problem)} * problem.pitch, 1, WALK_PIXELS);
}

void check_conv(Reasons &reasons, const HopperJob &job, int type) {
  const auto width = std::find(std::begin(WALK_COLUMNS), std::end(WALK_COLUMNS), job.columns);
  reasons.require(width != std::end(WALK_COLUMNS), "columns " + std::to_string(job.columns), "32, 64");
  reasons.between("ahead", job.ahead, 0, 1);
  if (width == std::end(WALK_COLUMNS))
    return;
  HopperConv conv = job.conv;
  if (conv.outputs >= 1 && conv.output[0].relu & HOPPER_FLOAT32) {
    reasons.require(conv.outputs == 1 && conv.residual == 0,
                    std::to_string(conv.outputs) + " outputs in float32" + (conv.residual ? " with a residual" : ""),
                    "one without a residual");
    conv.output[0].relu -= HOPPER_FLOAT32;
  }
  for (const std::string &why : conv_reasons(&conv, 1, type, config_of(job.columns)))
    reasons.list.push_back(reasons.where + why);
  reasons.between("halo", job.halo, 0, 1);
  if (job.halo == 1 && reasons.list.empty())
    check_halo(reasons, job);
}

void check_pool(Reasons &reasons, const HopperPool &pool) {
  const int64_t most = INT32_MAX / 4;
  const std::pair<const char *, int64_t> sizes[] = {{"n", pool.n},   {"h", pool.h},   {"w", pool.w},   {"c", pool.c},
                                                    {"kh", pool.kh}, {"kw", pool.kw}, {"oh", pool.oh}, {"ow", pool.ow}};
  for (const auto &[name, value] : sizes)
    reasons.between((std::string(name) + " of a pool").c_str(), value, 1, most);
  reasons.between("kind of a pool", pool.kind, HOPPER_POOL_MAX, HOPPER_POOL_AVERAGE_PADDED);
  reasons.between("relu of a pool", pool.relu, 0, 1);
  reasons.between("rows of a pool's stride", pool.stride_h, 1, most);
  reasons.between("columns of a pool's stride", pool.stride_w, 1, most);
  const std::pair<const char *, std::pair<int, int>> padding[] = {{"top", {pool.top, pool.kh}},
                                                                  {"bottom", {pool.bottom, pool.kh}},
                                                                  {"left", {pool.left, pool.kw}},
                                                                  {"right", {pool.right, pool.kw}}};
  for (const auto &[name, side] : padding)
    reasons.between((std::string(name) + " of a pool").c_str(), side.first, 0, side.second - 1);
  reasons.require(pool.c % 8 == 0, "c " + std::to_string(pool.c) + " of a pool", "multiples of 8");
  reasons.address("x of a pool", pool.x);
  reasons.address("y of a pool", pool.y);
  reasons.require(pool.shift % 16 == 0, "address " + std::to_string(pool.shift) + " of shift", "multiples of 16");
  for (const int64_t pitch : {pool.x_pitch, pool.y_pitch})
    reasons.require(pitch >= pool.c && pitch % 8 == 0 && pitch < most, "pitch " + std::to_string(pitch) + " of a pool",
                    "multiples of 8, at least its channels");
  const double items = 1.0 * pool.n * pool.oh * pool.ow * pool.c / 8;
  reasons.require(items < static_cast<double>(most), std::to_string(items) + " items of a pool", "fewer than 2^29");
  const int64_t last_h = int64_t{pool.oh - 1} * pool.stride_h - pool.top;
  const int64_t last_w = int64_t{pool.ow - 1} * pool.stride_w - pool.left;
  reasons.require(last_h < pool.h && last_w < pool.w, "windows of a pool beyond its map",
                  "those that hold an element of it");
}

void check_needs(Reasons &reasons, const HopperJob &job, int index) {
  reasons.between("needs", job.needs, 0, HOPPER_NEEDS);
  for (int i = 0; i < std::min(job.needs, HOPPER_NEEDS); ++i)
    reasons.between("a needed job", job.need[i], 0, index - 1);
}

void check_walk(const HopperJob *jobs, int count, int blocks) {
  const std::vector<std::string> reasons = walk_reasons(jobs, count, HOPPER_BFLOAT16);
  if (!reasons.empty())
    throw std::invalid_argument(reasons.front());
  if (blocks < 1 || blocks > MOST_BLOCKS)
    throw std::invalid_argument("blocks " + std::to_string(blocks) + "; allowed: 1 to " + std::to_string(MOST_BLOCKS));
}

} // namespace

namespace inception_fast::hopper {

std::vector<std::string> walk_reasons(const HopperJob *jobs, int count, int type) {
  Reasons reasons;
  reasons.between("type", type, HOPPER_BFLOAT16, HOPPER_FLOAT16);
  reasons.between("jobs of a walk", count, 1, MOST_JOBS);
  if (!reasons.list.empty())
    return reasons.list;
  for (int i = 0; i < count; ++i) {
    if (count > 1)
      reasons.where = "job " + std::to_string(i) + ": ";
    reasons.between("kind", jobs[i].kind, HOPPER_JOB_CONV, HOPPER_JOB_POOL);
    check_needs(reasons, jobs[i], i);
    if (jobs[i].kind == HOPPER_JOB_CONV)
      check_conv(reasons, jobs[i], type);
    else if (jobs[i].kind == HOPPER_JOB_POOL)
      check_pool(reasons, jobs[i].pool);
  }
  return reasons.list;
}

} // namespace inception_fast::hopper

extern "C" {

int32_t hopper_walk_columns(int32_t *columns, int32_t capacity) {
  return guarded(-1, [&] {
    return copied(std::vector<int32_t>(std::begin(WALK_COLUMNS), std::end(WALK_COLUMNS)), columns, capacity);
  });
}

int32_t hopper_walk_reasons(const HopperJob *jobs, int32_t count, int32_t type, char *text, int64_t capacity) {
  return guarded(-1, [&] { return written(walk_reasons(jobs, count, type), text, capacity); });
}

int64_t hopper_walk_units(const HopperJob *jobs, int32_t count, int32_t blocks, int32_t *job, int32_t *block,
                          int64_t capacity) {
  return guarded(int64_t{-1}, [&] {
    check_walk(jobs, count, blocks);
    int64_t units = 0;
    const std::vector<std::vector<Unit>> lists = walk_lists(jobs, count, blocks);
    for (size_t i = 0; i < lists.size(); ++i)
      for (const Unit &unit : lists[i]) {
        if (units < capacity) {
          job[units] = unit.tile.problem;
          block[units] = static_cast<int32_t>(i);
        }
        ++units;
      }
    return units;
  });
}

int32_t hopper_walk_sizes(const HopperJob *jobs, int32_t count, int32_t blocks, HopperWalkSizes *sizes) {
  return guarded(1, [&] {
    check_walk(jobs, count, blocks);
    const WalkWorkspace workspace = walk_workspace(jobs, count);
    *sizes = {walk_table(jobs, count, blocks).bytes, workspace.bytes, workspace.counters};
    return 0;
  });
}
}
