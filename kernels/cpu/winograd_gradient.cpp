#include "winograd_gradient_op.h"

#include "parallel.h"
#include "winograd_pack.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace inception_fast::cpu {

namespace {

constexpr int64_t MOST_DEPTH = 192, LEAST_DEPTH = 64; // tiles of a block: two vectors of them fit the level 1 cache
constexpr int64_t BLOCK_BYTES = 6 << 20, OWN_BYTES = 1 << 20; // of a transformed block: of all workers, or of each
// Workers that write and read each other's blocks wait for lines: where sums are small there are chunks for each.
constexpr int64_t SUM_BYTES = 640 << 10, MOST_CHUNKS = 16;

const GradientTilesTier &kernels_of(const Tier &tier) {
#ifdef INCEPTION_FAST_X86
  if (&tier == &avx2_tier)
    return avx2_gradient_tiles;
  if (&tier == &avx512_tier || &tier == &avx512_bf16_tier || &tier == &amx_bf16_tier)
    return avx512_gradient_tiles;
#endif
  if (&tier == &generic_tier || &tier == &amx_emulated_tier)
    return generic_gradient_tiles;
  throw std::invalid_argument(std::string("tier '") + tier.name + "' has no weight gradient by tiles");
}

void check(const WeightGradientOp &op) {
  auto size = [](int64_t h, int64_t w) { return std::to_string(h) + "x" + std::to_string(w); };
  if (op.stride_h != 1 || op.stride_w != 1)
    throw std::invalid_argument("a weight gradient by tiles at stride " + size(op.stride_h, op.stride_w) +
                                "; allowed: 1x1");
  std::string allowed;
  for (const WinogradTile &t : winograd_tiles()) {
    if (t.kh == op.kh && t.kw == op.kw && t.h == op.tile_h && t.w == op.tile_w)
      return;
    allowed += (allowed.empty() ? "" : ", ") + size(t.h, t.w) + " for " + size(t.kh, t.kw);
  }
  throw std::invalid_argument("a weight gradient by tile " + size(op.tile_h, op.tile_w) + " for kernel " +
                              size(op.kh, op.kw) + "; allowed: " + allowed);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Job {
  GradientTilesOp op;
  const GradientTilesTier &kernels;
  int64_t tiles, blocks; // blocks of a chunk
  bool apart;            // workers have chunks of their own, else all share each
};

// Transforms and multiplies block after block of tiles [op.first, end).
void run_blocks(const Job &job, GradientTilesOp &op, int64_t end, const Worker &worker, const Meeting &meet) {
  int64_t tiles = end - op.first;
  for (int64_t block = 0; block < job.blocks; ++block) {
    op.begin = op.first + tiles * block / job.blocks, op.end = op.first + tiles * (block + 1) / job.blocks;
    job.kernels.transform(op, worker);
    meet();
    job.kernels.multiply(op, worker);
    meet();
  }
}

void body(void *pointer, const Worker &worker, const Meeting &meet) {
  const Job &job = *static_cast<Job *>(pointer);
  GradientTilesOp op = job.op;
  Worker alone{0, 1, nullptr};
  int64_t low = 0, high = op.chunks;
  if (job.apart) {
    low = op.chunks * worker.index / worker.count, high = op.chunks * (worker.index + 1) / worker.count;
    op.x += worker.index * op.points * op.x_apart, op.grad += worker.index * op.points * op.grad_apart;
  }
  for (int64_t chunk = low; chunk < high; ++chunk) {
    op.first = job.tiles * chunk / op.chunks;
    op.sums = job.op.sums + chunk * op.points * op.sums_apart;
    int64_t end = job.tiles * (chunk + 1) / op.chunks;
    if (job.apart)
      run_blocks(job, op, end, alone, Meeting{[](void *) {}, nullptr});
    else
      run_blocks(job, op, end, worker, meet);
  }
  if (job.apart)
    meet();
  job.kernels.finish(job.op, worker);
}

// Chunks, blocks and their sizes.
void schedule(Job &job) {
  GradientTilesOp &op = job.op;
  const WeightGradientOp &of = op.of;
  int64_t lanes = job.kernels.lanes, panels = ceil_div(op.vectors, 2), heights = ceil_div(of.oc, of.rows);
  auto lines = [](int64_t floats) { return (ceil_div(floats, 16) | 1) * 16; };
  op.sums_apart = lines(of.oc * op.vectors * lanes);
  op.chunks = 1;
  while (4 * op.points * op.sums_apart <= SUM_BYTES && op.chunks < MOST_CHUNKS &&
         job.tiles >= 2 * op.chunks * MOST_DEPTH)
    op.chunks *= 2;
  int64_t each = 4 * op.points * (2 * panels * lanes + heights * of.rows), tiles = ceil_div(job.tiles, op.chunks);
  int64_t depth = std::clamp((op.chunks > 1 ? OWN_BYTES : BLOCK_BYTES) / each, LEAST_DEPTH, MOST_DEPTH);
  job.blocks = ceil_div(tiles, depth);
  op.depth = ceil_div(tiles, job.blocks);
  op.x_apart = lines(2 * panels * op.depth * lanes), op.grad_apart = lines(heights * op.depth * of.rows);
}

} // namespace

void winograd_gradient(const Tier &tier, const WeightGradientOp &from, int threads) {
  check(from);
  Job job{{}, kernels_of(tier), 0, 0, false};
  GradientTilesOp &op = job.op;
  op.of = from;
  op.of.rows = rows_for(job.kernels.most_rows, job.kernels.least_rows, from.oc);
  op.points = (from.kh + from.tile_h - 1) * (from.kw + from.tile_w - 1);
  op.vectors = static_cast<int32_t>(ceil_div(from.c, job.kernels.lanes));
  job.tiles = from.n * ceil_div(from.oh, from.tile_h) * ceil_div(from.ow, from.tile_w);
  schedule(job);
  threads = std::min(threads, op.points * op.vectors); // as many shares of the products
  job.apart = op.chunks % threads == 0 || op.chunks >= 2 * threads;
  int64_t floats = 0, zeros = ceil_div(std::max(from.c, from.oc), 16) * 16, blocks = job.apart ? threads : 1;
  auto room = [&](int64_t more) { return std::exchange(floats, floats + more); };
  int64_t x = room(blocks * op.points * op.x_apart), grad = room(blocks * op.points * op.grad_apart);
  int64_t sums = room(op.chunks * op.points * op.sums_apart), pixel = room(zeros);
  int64_t steps = room(ceil_div(op.depth, 16) * 16); // whole lines, as all of these
  float *memory = reinterpret_cast<float *>(gradient_scratch(4 * floats));
  op.zeros = static_cast<float *>(std::memset(memory + pixel, 0, 4 * zeros));
  op.x = memory + x, op.grad = memory + grad, op.sums = memory + sums;
  op.of.steps = reinterpret_cast<int32_t *>(memory + steps); // all of them
  for (int32_t i = 0; i < op.depth; ++i)
    op.of.steps[i] = i * op.of.rows;
  run_shared(threads, body, &job);
}

} // namespace inception_fast::cpu
