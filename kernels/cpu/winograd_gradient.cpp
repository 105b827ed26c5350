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
constexpr int64_t BLOCK_BYTES = 2 << 20;              // transformed, for the level 2 caches

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
  if (op.type != Type::float32 || op.stride_h != 1 || op.stride_w != 1)
    throw std::invalid_argument("a weight gradient by tiles of another type than float32 or at stride " +
                                size(op.stride_h, op.stride_w) + "; allowed: float32 at stride 1x1");
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
  int64_t tiles, blocks;
};

void body(void *pointer, const Worker &worker, const Meeting &meet) {
  const Job &job = *static_cast<Job *>(pointer);
  GradientTilesOp op = job.op;
  for (int64_t block = 0; block < job.blocks; ++block) {
    op.begin = job.tiles * block / job.blocks, op.end = job.tiles * (block + 1) / job.blocks;
    job.kernels.transform(op, worker);
    meet();
    job.kernels.multiply(op, worker);
    meet();
  }
  job.kernels.finish(op, worker);
}

} // namespace

void winograd_gradient(const Tier &tier, const WeightGradientOp &from, int threads) {
  check(from);
  const GradientTilesTier &kernels = kernels_of(tier);
  Job job{{}, kernels, 0, 0};
  GradientTilesOp &op = job.op;
  op.of = from;
  op.of.rows = rows_for(kernels.most_rows, kernels.least_rows, from.oc);
  op.points = (from.kh + from.tile_h - 1) * (from.kw + from.tile_w - 1);
  op.vectors = static_cast<int32_t>(ceil_div(from.c, kernels.lanes));
  job.tiles = from.n * ceil_div(from.oh, from.tile_h) * ceil_div(from.ow, from.tile_w);
  int64_t panels = ceil_div(op.vectors, 2), heights = ceil_div(from.oc, op.of.rows), wide = 2 * kernels.lanes;
  int64_t each = 4 * op.points * (panels * wide + heights * op.of.rows);
  int64_t depth = std::clamp(BLOCK_BYTES / each, LEAST_DEPTH, MOST_DEPTH);
  job.blocks = ceil_div(job.tiles, depth);
  op.depth = ceil_div(job.tiles, job.blocks);
  auto lines = [](int64_t floats) { return (ceil_div(floats, 16) | 1) * 16; };
  op.x_apart = lines(panels * op.depth * wide);
  op.grad_apart = lines(heights * op.depth * op.of.rows);
  op.sums_apart = lines(from.oc * op.vectors * kernels.lanes);
  int64_t floats = 0, zeros = lines(std::max(from.c, from.oc));
  auto room = [&](int64_t more) { return std::exchange(floats, floats + more); };
  int64_t pixel = room(zeros), x = room(op.points * op.x_apart), grad = room(op.points * op.grad_apart);
  int64_t sums = room(op.points * op.sums_apart);
  float *memory = reinterpret_cast<float *>(gradient_scratch(4 * floats));
  op.zeros = static_cast<float *>(std::memset(memory + pixel, 0, 4 * zeros));
  op.x = memory + x, op.grad = memory + grad, op.sums = memory + sums;
  int64_t items = op.points * panels * heights;
  run_shared(static_cast<int>(std::min<int64_t>(threads, items)), body, &job);
}

} // namespace inception_fast::cpu
