#include "batch_norm_op.h"

#include "parallel.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>

namespace inception_fast::cpu {

namespace {

constexpr int64_t BLOCK_BYTES = 32 << 10; // a block is read twice: it stays in the level 1 or 2 cache
constexpr int64_t LEAST = 16, MOST = 128; // pixels: short float sums, and partial sums that are small beside x
constexpr int32_t TILE = 64;              // channels combined at a time

struct Tiers {
  const Tier *tier;
  const BatchNormTier *kernels;
};

const BatchNormTier &kernels_of(const Tier &tier) {
  const Tiers known[] = {
      {&generic_tier, &generic_batch_norm},
      {&amx_emulated_tier, &generic_batch_norm},
#ifdef INCEPTION_FAST_X86
      {&avx2_tier, &avx2_batch_norm},
      {&avx512_tier, &avx512_batch_norm},
      {&avx512_bf16_tier, &avx512_bf16_batch_norm},
      {&amx_bf16_tier, &avx512_bf16_batch_norm},
#endif
  };
  for (const Tiers &each : known)
    if (each.tier == &tier)
      return *each.kernels;
  throw std::invalid_argument(std::string("tier '") + tier.name + "' has no batch norm");
}

struct Range {
  int32_t first, end;
};

Range channels_of(const BatchNormOp &op, const Worker &worker) {
  int64_t tiles = (op.c + TILE - 1) / TILE;
  auto at = [&](int64_t tile) { return static_cast<int32_t>(std::min<int64_t>(tile * TILE, op.c)); };
  return {at(tiles * worker.index / worker.count), at(tiles * (worker.index + 1) / worker.count)};
}

double pixels_of(const BatchNormOp &op, int64_t block) {
  return static_cast<double>(std::min(op.block, op.pixels - block * op.block));
}

double scale_of(const BatchNormOp &op, int32_t i) { return op.weight[i] / std::sqrt(op.var[i] + op.eps); }

void move(float &running, double to, double share) { running = static_cast<float>(running + share * (to - running)); }

// Chan's formula over the blocks, in their order: the squares round the mean are those round each block's mean, and the
// block means' distances from it.
void combine_statistics(const BatchNormOp &op, const Worker &worker) {
  Range range = channels_of(op, worker);
  for (int32_t c = range.first; c < range.end; c += TILE) {
    int32_t count = std::min(TILE, range.end - c);
    double mean[TILE] = {}, squares[TILE] = {};
    for (int64_t block = 0; block < op.blocks; ++block)
      for (int32_t i = 0; i < count; ++i)
        mean[i] += pixels_of(op, block) * op.partial[block * 2 * op.c + c + i];
    for (int32_t i = 0; i < count; ++i)
      mean[i] /= static_cast<double>(op.pixels);
    for (int64_t block = 0; block < op.blocks; ++block) {
      const float *part = op.partial + block * 2 * op.c + c;
      for (int32_t i = 0; i < count; ++i) {
        double d = part[i] - mean[i];
        squares[i] += part[op.c + i] + pixels_of(op, block) * d * d;
      }
    }
    for (int32_t i = 0; i < count; ++i) {
      op.mean[c + i] = static_cast<float>(mean[i]);
      op.var[c + i] = static_cast<float>(squares[i] / static_cast<double>(op.pixels));
      op.scale[c + i] = static_cast<float>(scale_of(op, c + i));
    }
    if (op.running_mean)
      for (int32_t i = 0; i < count; ++i) {
        move(op.running_mean[c + i], mean[i], op.share);
        move(op.running_var[c + i], squares[i] / static_cast<double>(op.pixels - 1), op.share);
      }
  }
}

void combine_gradients(const BatchNormOp &op, const Worker &worker) {
  Range range = channels_of(op, worker);
  for (int32_t c = range.first; c < range.end; c += TILE) {
    int32_t count = std::min(TILE, range.end - c);
    double sums[TILE] = {}, products[TILE] = {};
    for (int64_t block = 0; block < op.blocks; ++block) {
      const float *part = op.partial + block * 2 * op.c + c;
      for (int32_t i = 0; i < count; ++i) {
        sums[i] += part[i];
        products[i] += part[op.c + i];
      }
    }
    for (int32_t i = 0; i < count; ++i) {
      double pixels = static_cast<double>(op.pixels), spread = op.var[c + i] + op.eps, scale = scale_of(op, c + i);
      op.grad_bias[c + i] = static_cast<float>(sums[i]);
      op.grad_weight[c + i] = static_cast<float>(products[i] / std::sqrt(spread));
      op.offset[c + i] = static_cast<float>(-scale * sums[i] / pixels);
      op.slope[c + i] = static_cast<float>(-scale * products[i] / (spread * pixels));
    }
  }
}

struct Call {
  const BatchNormOp &op;
  const BatchNormTier &kernels;
};

void forward(void *pointer, const Worker &worker, const Meeting &meet) {
  const auto &[op, kernels] = *static_cast<Call *>(pointer);
  kernels.statistics(op, worker);
  meet();
  combine_statistics(op, worker);
  if (op.batches && worker.index == 0)
    ++*op.batches;
  meet();
  kernels.apply(op, worker);
}

void backward(void *pointer, const Worker &worker, const Meeting &meet) {
  const auto &[op, kernels] = *static_cast<Call *>(pointer);
  kernels.gradient_sums(op, worker);
  meet();
  combine_gradients(op, worker);
  meet();
  kernels.gradient(op, worker);
}

void run(const Tier &tier, BatchNormOp op, int threads, Shared body, bool gradients) {
  if (op.pixels < 1 || op.c < 1)
    throw std::invalid_argument("batch norm of " + std::to_string(op.pixels) + " pixels with " + std::to_string(op.c) +
                                " channels; allowed: at least one of each");
  if (op.running_mean && op.pixels < 2)
    throw std::invalid_argument("running statistics of one value a channel; allowed: two or more, for a variance");
  int64_t bytes = int64_t(op.c) * (op.type == Type::float32 ? 4 : 2);
  op.block = std::clamp(BLOCK_BYTES / bytes / 8 * 8, LEAST, MOST);
  op.blocks = (op.pixels + op.block - 1) / op.block;
  std::unique_ptr<float[]> memory(new float[(2 * op.blocks + 3) * op.c]);
  op.partial = memory.get();
  op.scale = op.partial + 2 * op.blocks * op.c;
  op.slope = op.scale + op.c;
  op.offset = op.slope + op.c;
  if (gradients)
    for (int32_t i = 0; i < op.c; ++i)
      op.scale[i] = static_cast<float>(scale_of(op, i));
  Call call{op, kernels_of(tier)};
  run_shared(static_cast<int>(std::min<int64_t>(threads, op.blocks)), body, &call);
}

} // namespace

void batch_norm_relu(const Tier &tier, const BatchNormOp &op, int threads) { run(tier, op, threads, forward, false); }

void batch_norm_relu_backward(const Tier &tier, const BatchNormOp &op, int threads) {
  run(tier, op, threads, backward, true);
}

} // namespace inception_fast::cpu
