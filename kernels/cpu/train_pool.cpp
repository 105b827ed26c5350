#include "train_pool_op.h"

#include "parallel.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace inception_fast::cpu {

namespace {

struct Tiers {
  const Tier *tier;
  const TrainPoolTier *kernels;
};

const TrainPoolTier &kernels_of(const Tier &tier) {
  const Tiers known[] = {
      {&generic_tier, &generic_train_pool},
      {&amx_emulated_tier, &generic_train_pool},
#ifdef INCEPTION_FAST_X86
      {&avx2_tier, &avx2_train_pool},
      {&avx512_tier, &avx512_train_pool},
      {&avx512_bf16_tier, &avx512_bf16_train_pool},
      {&amx_bf16_tier, &avx512_bf16_train_pool},
#endif
  };
  for (const Tiers &each : known)
    if (each.tier == &tier)
      return *each.kernels;
  throw std::invalid_argument(std::string("tier '") + tier.name + "' has no pools in training");
}

void expect_axis(const char *axis, int32_t size, int32_t kernel, int32_t stride, int32_t before, int32_t out) {
  bool positive = size > 0 && kernel > 0 && stride > 0 && out > 0;
  // Every window has to meet the map, and the padding to be no more than half of it.
  if (!positive || before < 0 || 2 * before > kernel || int64_t(out - 1) * stride - before >= size)
    throw std::invalid_argument(std::string("a pool over ") + std::to_string(size) + " " + axis + " with kernel " +
                                std::to_string(kernel) + ", stride " + std::to_string(stride) + ", padding " +
                                std::to_string(before) + " and " + std::to_string(out) +
                                " results; allowed: windows that meet the map, padded by at most half of them");
}

struct Call {
  const TrainPoolOp &op;
  void (*kernel)(const TrainPoolOp &, const Worker &);
};

void body(void *pointer, const Worker &worker, const Meeting &) {
  const Call &call = *static_cast<Call *>(pointer);
  call.kernel(call.op, worker);
}

void run(const TrainPoolOp &op, int64_t pixels, int threads, void (*kernel)(const TrainPoolOp &, const Worker &)) {
  if (op.n < 1 || op.c < 1 || op.pitch < op.c)
    throw std::invalid_argument("a pool of " + std::to_string(op.n) + " images with " + std::to_string(op.c) +
                                " channels, pixels " + std::to_string(op.pitch) +
                                " apart; allowed: at least one of each, pixels that do not overlap");
  expect_axis("rows", op.h, op.kh, op.stride_h, op.top, op.oh);
  expect_axis("columns", op.w, op.kw, op.stride_w, op.left, op.ow);
  if (int64_t(op.kh) * op.kw > MOST_TAPS)
    throw std::invalid_argument("a pool of " + std::to_string(op.kh) + "x" + std::to_string(op.kw) +
                                " places; allowed: at most " + std::to_string(MOST_TAPS));
  Call call{op, kernel};
  run_shared(static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, pixels))), body, &call);
}

} // namespace

void train_pool(const Tier &tier, const TrainPoolOp &op, int threads) {
  run(op, int64_t(op.n) * op.oh * op.ow, threads, kernels_of(tier).forward);
}

void train_pool_backward(const Tier &tier, const TrainPoolOp &op, int threads) {
  run(op, int64_t(op.n) * op.h * op.w, threads, kernels_of(tier).backward);
}

} // namespace inception_fast::cpu
