#include "weight_gradient_op.h"

#include "parallel.h"
#include "winograd_gradient_op.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace inception_fast::cpu {

namespace {

constexpr int64_t DEPTH =
    192; // steps: the more, the rarer dw is read and written; two vectors of them fit the level 1 cache
constexpr int64_t ROW_BYTES = 512 << 10, STRETCHES = 16; // packed gradients between two meetings, for the level 2 cache
// With fewer shares of the outputs the pixels are shared out, in chunks of at least so many.
constexpr int64_t FEW_ITEMS = 64, CHUNK_PIXELS = 512, MOST_CHUNKS = 16;

const WeightGradientTier &kernels_of(const Tier &tier) {
  struct {
    const Tier *tier;
    const WeightGradientTier *kernels;
  } const known[] = {
      {&generic_tier, &generic_weight_gradient},
      {&amx_emulated_tier, &generic_weight_gradient},
#ifdef INCEPTION_FAST_X86
      {&avx2_tier, &avx2_weight_gradient},
      {&avx512_tier, &avx512_weight_gradient},
      {&avx512_bf16_tier, &avx512_bf16_weight_gradient},
      {&amx_bf16_tier, &avx512_bf16_weight_gradient},
#endif
  };
  for (const auto &each : known)
    if (each.tier == &tier)
      return *each.kernels;
  throw std::invalid_argument(std::string("tier '") + tier.name + "' has no weight gradient");
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pixels of a stretch, even: all but the last are alike, and that one is no rest of some pixels, for each costs a pass
// over dw. An eighth more than `usual` still fits where `usual` does.
int64_t depth_of(int64_t pixels, int64_t usual) {
  int64_t stretches = ceil_div(8 * pixels, 9 * usual);
  return (ceil_div(pixels, stretches) + 1) / 2 * 2;
}

struct Job {
  WeightGradientOp op;
  const WeightGradientTier &kernels;
  int64_t stretches;     // between two meetings
  int64_t packed_floats; // of a stretch
  int64_t size;          // of dw
  int64_t chunks;        // of pixels, each with a dw of its own; 1: the outputs are shared out instead
  float *sums;           // [chunks][dw]
};

// All workers on the pixels of `op`, each with outputs of its own.
void share_outputs(const Job &job, const WeightGradientOp &op, const Worker &worker, const Meeting &meet) {
  for (int64_t first = op.begin; first < op.end; first += job.stretches * op.depth) {
    if (first > op.begin)
      meet(); // the rows of the stretches before are no longer needed
    int64_t end = std::min(op.end, first + job.stretches * op.depth);
    auto each = [&](auto kernel) {
      WeightGradientOp one = op;
      for (int64_t at = first; at < end; at += op.depth, one.packed += job.packed_floats)
        kernel(one, at, worker);
    };
    each(job.kernels.pack);
    meet();
    each(job.kernels.multiply);
  }
}

// Each worker on chunks of its own; then the chunks' sums are added up in order, in pieces of dw.
void share_pixels(const Job &job, const Worker &worker, const Meeting &meet) {
  const WeightGradientOp &op = job.op;
  WeightGradientOp one = op;
  one.packed += worker.index * job.packed_floats;
  one.columns += worker.index * op.units * job.kernels.columns;
  one.places += worker.index * (op.depth + 1);
  one.steps += worker.index * op.units;
  int64_t low = job.chunks * worker.index / worker.count, high = job.chunks * (worker.index + 1) / worker.count;
  for (int64_t chunk = low; chunk < high; ++chunk) {
    one.begin = op.end * chunk / job.chunks, one.end = op.end * (chunk + 1) / job.chunks;
    one.dw = job.sums + chunk * job.size;
    for (int64_t at = one.begin; at < one.end; at += one.depth) {
      job.kernels.pack(one, at, Worker{0, 1, nullptr});
      job.kernels.multiply(one, at, Worker{0, 1, nullptr});
    }
  }
  meet();
  int64_t from = job.size * worker.index / worker.count, to = job.size * (worker.index + 1) / worker.count;
  if (from == to)
    return;
  std::memcpy(op.dw + from, job.sums + from, sizeof(float) * (to - from));
  for (int64_t chunk = 1; chunk < job.chunks; ++chunk)
    for (int64_t i = from; i < to; ++i)
      op.dw[i] += job.sums[chunk * job.size + i];
}

void body(void *pointer, const Worker &worker, const Meeting &meet) {
  const Job &job = *static_cast<Job *>(pointer);
  if (job.chunks > 1)
    share_pixels(job, worker, meet);
  else
    share_outputs(job, job.op, worker, meet);
}

void check(const WeightGradientOp &op, int threads) {
  int64_t pixels = int64_t(op.n) * op.oh * op.ow;
  if (pixels < 1 || std::min({op.c, op.oc, op.kh, op.kw, op.stride_h, op.stride_w}) < 1 || threads < 1)
    throw std::invalid_argument("a weight gradient over " + std::to_string(pixels) + " pixels, " +
                                std::to_string(op.c) + " to " + std::to_string(op.oc) + " channels on " +
                                std::to_string(threads) + " threads; allowed: at least one of each");
}

} // namespace

int32_t rows_for(int most, int least, int32_t oc) {
  auto covered = [&](int32_t rows) { return ceil_div(oc, rows) * rows; };
  int32_t best = most;
  for (int32_t rows = best - 1; rows >= least; --rows)
    if (covered(rows) < covered(best))
      best = rows;
  return best;
}

char *gradient_scratch(int64_t bytes) {
  struct Free {
    void operator()(void *p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<char, Free> memory;
  static thread_local int64_t held = 0;
  if (held < bytes) {
    memory.reset();
    held = 0;
    memory.reset(static_cast<char *>(std::aligned_alloc(64, bytes)));
    if (!memory)
      throw std::bad_alloc();
    held = bytes;
  }
  return memory.get();
}

void weight_gradient(const Tier &tier, const WeightGradientOp &from, int threads) {
  check(from, threads);
  if (from.tile_h > 0 || from.tile_w > 0)
    return winograd_gradient(tier, from, threads);
  const WeightGradientTier &kernels = kernels_of(tier);
  Job job{from, kernels, 1, 0, 0, 1, nullptr};
  WeightGradientOp &op = job.op;
  op.begin = 0, op.end = int64_t(op.n) * op.oh * op.ow;
  op.rows = rows_for(kernels.most_rows, kernels.least_rows, op.oc);
  bool pairs = kernels.pairs && op.type == Type::bfloat16;
  int64_t taps = int64_t(op.kh) * op.kw, tiles = ceil_div(op.oc, op.rows);
  int64_t items = tiles * taps * ceil_div(op.c, kernels.columns);
  job.size = op.oc * taps * op.c;
  while (items < FEW_ITEMS && job.chunks < MOST_CHUNKS && op.end >= 2 * job.chunks * CHUNK_PIXELS)
    job.chunks *= 2;
  threads = static_cast<int>(std::min<int64_t>(threads, job.chunks > 1 ? job.chunks : items));
  op.depth = depth_of(ceil_div(op.end, job.chunks), pairs ? 2 * DEPTH : DEPTH);
  op.units = pairs ? op.depth / 2 : op.depth;
  job.packed_floats = tiles * op.units * op.rows;
  job.stretches = std::clamp<int64_t>(ROW_BYTES / (4 * job.packed_floats), 1, STRETCHES);
  job.stretches = std::min(job.stretches, ceil_div(op.end, op.depth));
  int64_t bytes = 0;
  auto room = [&](int64_t more) { return std::exchange(bytes, bytes + ceil_div(more, 64) * 64); };
  int64_t packed = room(4 * job.packed_floats * (job.chunks > 1 ? threads : job.stretches));
  int64_t columns = room(4 * threads * op.units * kernels.columns);
  int64_t places = room(sizeof(void *) * threads * (op.depth + 1));
  int64_t steps = room(sizeof(int32_t) * threads * op.units);
  int64_t zeros = room((op.type == Type::float32 ? 4 : 2) * op.c);
  int64_t sums = room(job.chunks > 1 ? 4 * job.chunks * job.size : 0);
  char *memory = gradient_scratch(bytes);
  op.packed = reinterpret_cast<float *>(memory + packed);
  op.columns = reinterpret_cast<float *>(memory + columns);
  op.places = reinterpret_cast<const void **>(memory + places);
  op.steps = reinterpret_cast<int32_t *>(memory + steps);
  op.zeros = std::memset(memory + zeros, 0, sums - zeros);
  job.sums = reinterpret_cast<float *>(memory + sums);
  run_shared(threads, body, &job);
}

} // namespace inception_fast::cpu
