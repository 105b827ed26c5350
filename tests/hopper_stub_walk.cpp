// The walk over host memory, by plain loops, in an order that no kernel would take: always the last job, or any one, of
// those whose needs have ended. So a need that is not stated shows as a wrong number.
#include "hopper_stub.h"
#include "walk_api.h"

#include <limits>
#include <random>

using namespace stub;

namespace {

const int32_t widths[] = {32, 64};
int32_t order = 0; // 0: the last job that may run; above, the seed of any; below, that but job -1 - order if others may

struct Blob {
  int32_t count, type;
  uint64_t table, workspace, trace;
};

bool is_width(int32_t columns) {
  for (const int32_t width : widths)
    if (width == columns)
      return true;
  return false;
}

// Every tile of a split convolution has a counter here, every job one more, as in the kernels.
int64_t counters(const HopperJob *jobs, int32_t count) {
  int64_t found = count;
  for (int32_t i = 0; i < count; ++i)
    if (jobs[i].kind == HOPPER_JOB_CONV && jobs[i].conv.splits > 1)
      found += (pixels(jobs[i].conv) + 63) / 64 * ((jobs[i].conv.oc + jobs[i].columns - 1) / jobs[i].columns);
  return (4 * found + 255) / 256 * 256;
}

void pool(const HopperPool &pool, int32_t type) {
  const float *shift = reinterpret_cast<const float *>(pool.shift);
  for (int64_t pixel = 0; pixel < int64_t(pool.n) * pool.oh * pool.ow; ++pixel)
    for (int32_t channel = 0; channel < pool.c; ++channel) {
      const int64_t image = pixel / (pool.oh * pool.ow);
      const int32_t top = int32_t(pixel / pool.ow % pool.oh) * pool.stride_h - pool.top;
      const int32_t left = int32_t(pixel % pool.ow) * pool.stride_w - pool.left;
      float largest = -std::numeric_limits<float>::infinity(), total = 0;
      int32_t inside = 0, padded = 0;
      for (int32_t row = top; row < top + pool.kh; ++row)
        for (int32_t col = left; col < left + pool.kw; ++col) {
          padded += row < pool.h + pool.bottom && col < pool.w + pool.right;
          if (row < 0 || row >= pool.h || col < 0 || col >= pool.w)
            continue;
          const float x = load(pool.x, ((image * pool.h + row) * pool.w + col) * pool.x_pitch + channel, type);
          ++inside;
          total += x;
          if (x != x || x > largest)
            largest = x;
        }
      float y = largest;
      if (pool.kind != HOPPER_POOL_MAX)
        y = total / float(pool.kind == HOPPER_POOL_AVERAGE ? inside : padded);
      y += shift ? shift[channel] : 0;
      store(pool.y, pixel * pool.y_pitch + channel, type, pool.relu && y < 0 ? 0 : y);
    }
}

void complain_of(const HopperJob &job, int32_t index, std::string &all, int32_t &found) {
  std::string mine;
  int32_t count = 0;
  if (job.kind == HOPPER_JOB_CONV) {
    stub::complain_of(job.conv, mine, count);
    complain(mine, count, !is_width(job.columns), "columns " + std::to_string(job.columns) + "; allowed: 32, 64");
  } else {
    const HopperPool &one = job.pool;
    complain(mine, count, one.c % 8, "c " + std::to_string(one.c) + "; allowed: multiples of 8");
    complain(mine, count, one.x % 16 || one.y % 16 || one.shift % 16 || one.x_pitch % 8 || one.y_pitch % 8,
             "a pool's maps are not on 16 bytes");
    complain(mine, count, one.n < 1 || one.kind < HOPPER_POOL_MAX || one.kind > HOPPER_POOL_AVERAGE_PADDED,
             "a pool of " + std::to_string(one.n) + " images, kind " + std::to_string(one.kind));
  }
  complain(mine, count, job.needs < 0 || job.needs > HOPPER_NEEDS, "needs " + std::to_string(job.needs));
  for (int32_t i = 0; i < job.needs && i < HOPPER_NEEDS; ++i)
    complain(mine, count, job.need[i] < 0 || job.need[i] >= index,
             "needs job " + std::to_string(job.need[i]) + "; allowed: earlier ones");
  complain(all, found, count > 0, "job " + std::to_string(index) + ": " + mine);
}

// The position of the job to run next among those that have not ended.
int32_t next(const std::vector<HopperJob> &jobs, const std::vector<char> &ended, std::mt19937 &random) {
  std::vector<int32_t> able;
  for (size_t i = 0; i < jobs.size(); ++i) {
    bool can = !ended[i];
    for (int32_t j = 0; j < jobs[i].needs; ++j)
      can = can && ended[jobs[i].need[j]];
    if (can)
      able.push_back(int32_t(i));
  }
  if (order > 0)
    return able[random() % able.size()];
  return able.size() > 1 && able.back() == -1 - order ? able[able.size() - 2] : able.back();
}

} // namespace

extern "C" {

int32_t hopper_walk_columns(int32_t *columns, int32_t capacity) {
  const int32_t count = sizeof widths / sizeof *widths;
  for (int32_t i = 0; i < count && i < capacity; ++i)
    columns[i] = widths[i];
  return count;
}

int32_t hopper_walk_reasons(const HopperJob *jobs, int32_t count, int32_t type, char *text, int64_t capacity) {
  std::string all;
  int32_t found = 0;
  complain(all, found, type != HOPPER_BFLOAT16 && type != HOPPER_FLOAT16, "type " + std::to_string(type));
  for (int32_t i = 0; i < count; ++i)
    complain_of(jobs[i], i, all, found);
  return told(all, found, text, capacity);
}

int32_t hopper_walk_sizes(const HopperJob *jobs, int32_t count, int32_t blocks, HopperWalkSizes *sizes) {
  if (blocks < 1)
    return fail("blocks " + std::to_string(blocks) + "; allowed: 1 or more");
  int64_t parts = 0;
  for (int32_t i = 0; i < count; ++i)
    if (jobs[i].kind == HOPPER_JOB_CONV && jobs[i].conv.splits > 1)
      parts += 4 * pixels(jobs[i].conv) * jobs[i].conv.oc * jobs[i].conv.splits;
  sizes->counters = counters(jobs, count);
  sizes->workspace = sizes->counters + (parts + 255) / 256 * 256;
  sizes->table = (int64_t(sizeof(HopperJob)) * count + 127) / 128 * 128;
  return 0;
}

// A job is one unit here.
int64_t hopper_walk_units(const HopperJob *, int32_t count, int32_t blocks, int32_t *job, int32_t *block,
                          int64_t capacity) {
  for (int32_t i = 0; i < count && i < capacity; ++i)
    job[i] = i, block[i] = i * blocks / count;
  return count;
}

int32_t hopper_walk_traced(const void *blob, uint64_t trace, void *traced) {
  Blob made;
  std::memcpy(&made, blob, sizeof made);
  made.trace = trace;
  std::memcpy(traced, &made, sizeof made);
  return 0;
}

int64_t hopper_walk_blob_bytes(void) { return sizeof(Blob); }

int32_t hopper_walk_prepare(const HopperJob *jobs, int32_t count, int32_t type, uint64_t table, uint64_t workspace,
                            int32_t, void *host_table, void *blob) {
  char text[1024];
  if (hopper_walk_reasons(jobs, count, type, text, sizeof text))
    return fail(text);
  if (!table || table % 128 || !workspace || workspace % 256)
    return fail("a table on 128 bytes and a workspace on 256 are needed");
  const Blob made{count, type, table, workspace, 0};
  std::memcpy(host_table, jobs, sizeof(HopperJob) * count);
  std::memcpy(blob, &made, sizeof made);
  return 0;
}

int32_t hopper_walk_launch(const void *blob, uint64_t stream) {
  Blob made;
  std::memcpy(&made, blob, sizeof made);
  if (stream)
    return fail("a stream on a machine without a GPU");
  std::vector<HopperJob> jobs(made.count); // from where the caller copied it to
  std::memcpy(jobs.data(), reinterpret_cast<const void *>(made.table), sizeof(HopperJob) * made.count);
  const int64_t bytes = counters(jobs.data(), made.count);
  for (int64_t i = 0; i < bytes; ++i)
    if (reinterpret_cast<const char *>(made.workspace)[i])
      return fail("a counter of the workspace is not zero");
  float *parts = reinterpret_cast<float *>(made.workspace + bytes);
  std::vector<char> ended(jobs.size());
  std::mt19937 random(order);
  int32_t splits = 1;
  for (size_t done = 0; done < jobs.size(); ++done) {
    const int32_t i = next(jobs, ended, random);
    if (made.trace) {
      uint64_t *marks = reinterpret_cast<uint64_t *>(made.trace) + i * HOPPER_WALK_MARKS;
      const uint64_t now = 10 * (done + 1);
      marks[0] = now, marks[1] = now + 1, marks[3] = now + 3;
      if (jobs[i].kind == HOPPER_JOB_CONV)
        marks[2] = now + 2;
    }
    if (jobs[i].kind == HOPPER_JOB_CONV) {
      parts = compute(jobs[i].conv, made.type, parts);
      splits = jobs[i].conv.splits > splits ? jobs[i].conv.splits : splits;
    } else {
      pool(jobs[i].pool, made.type);
    }
    ended[i] = 1;
  }
  launched.push_back({made.count, STUB_WALK, 0, splits});
  return 0;
}

void stub_walk_order(int32_t seed) { order = seed; }

// As `stub_layout`, of the structures of walk_api.h.
int32_t stub_walk_layout(int64_t *values, int32_t capacity) {
#define AT(type, field) int64_t(offsetof(type, field))
  const int64_t all[] = {sizeof(HopperPool),
                         AT(HopperPool, x),
                         AT(HopperPool, y),
                         AT(HopperPool, shift),
                         AT(HopperPool, x_pitch),
                         AT(HopperPool, y_pitch),
                         AT(HopperPool, n),
                         AT(HopperPool, h),
                         AT(HopperPool, w),
                         AT(HopperPool, c),
                         AT(HopperPool, kh),
                         AT(HopperPool, kw),
                         AT(HopperPool, stride_h),
                         AT(HopperPool, stride_w),
                         AT(HopperPool, top),
                         AT(HopperPool, left),
                         AT(HopperPool, bottom),
                         AT(HopperPool, right),
                         AT(HopperPool, oh),
                         AT(HopperPool, ow),
                         AT(HopperPool, kind),
                         AT(HopperPool, relu),
                         sizeof(HopperJob),
                         AT(HopperJob, kind),
                         AT(HopperJob, columns),
                         AT(HopperJob, ahead),
                         AT(HopperJob, halo),
                         AT(HopperJob, needs),
                         AT(HopperJob, need),
                         AT(HopperJob, conv),
                         AT(HopperJob, pool),
                         sizeof(HopperWalkSizes),
                         AT(HopperWalkSizes, table),
                         AT(HopperWalkSizes, workspace),
                         AT(HopperWalkSizes, counters)};
#undef AT
  const int32_t count = sizeof all / sizeof *all;
  std::memcpy(values, all, sizeof(int64_t) * (count < capacity ? count : capacity));
  return count;
}

} // extern "C"
