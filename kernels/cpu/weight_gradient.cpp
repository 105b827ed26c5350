#include "weight_gradient_op.h"

#include "parallel.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

namespace inception_fast::cpu {

namespace {

constexpr int64_t DEPTH = 256; // pixels: two vectors of them stay in the level 1 cache, or nearly so
constexpr int64_t ROW_BYTES = 512 << 10, STRETCHES = 16; // packed gradients between two meetings, for the level 2 cache

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

struct Job {
  const WeightGradientOp &op;
  const WeightGradientTier &kernels;
  int64_t stretches;  // between two meetings
  int64_t row_floats; // of a stretch
};

void body(void *pointer, const Worker &worker, const Meeting &meet) {
  const auto &[op, kernels, stretches, row_floats] = *static_cast<Job *>(pointer);
  int64_t pixels = int64_t(op.n) * op.oh * op.ow;
  for (int64_t first = 0; first < pixels; first += stretches * op.depth) {
    if (first > 0)
      meet(); // the rows of the stretches before are no longer needed
    int64_t end = std::min(pixels, first + stretches * op.depth);
    auto each = [&](auto kernel) {
      WeightGradientOp one = op;
      for (int64_t at = first; at < end; at += op.depth, one.rows += row_floats)
        kernel(one, at, worker);
    };
    each(kernels.pack);
    meet();
    each(kernels.multiply);
  }
}

struct Free {
  void operator()(void *p) const { std::free(p); }
};

} // namespace

void weight_gradient(const Tier &tier, const WeightGradientOp &from, int threads) {
  WeightGradientOp op = from;
  int64_t pixels = int64_t(op.n) * op.oh * op.ow;
  if (pixels < 1 || std::min({op.c, op.oc, op.kh, op.kw, op.stride_h, op.stride_w}) < 1 || threads < 1)
    throw std::invalid_argument("a weight gradient over " + std::to_string(pixels) + " pixels, " +
                                std::to_string(op.c) + " to " + std::to_string(op.oc) + " channels on " +
                                std::to_string(threads) + " threads; allowed: at least one of each");
  const WeightGradientTier &kernels = kernels_of(tier);
  bool pairs = kernels.pairs && op.type == Type::bfloat16;
  op.depth = std::min(pairs ? 2 * DEPTH : DEPTH, (pixels + 1) / 2 * 2);
  op.units = pairs ? op.depth / 2 : op.depth;
  int64_t tiles = (op.oc + kernels.rows - 1) / kernels.rows;
  int64_t items = tiles * op.kh * op.kw * ((op.c + kernels.columns - 1) / kernels.columns);
  threads = static_cast<int>(std::min<int64_t>(threads, items));
  auto round = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  int64_t row_floats = tiles * op.units * kernels.rows;
  int64_t stretches = std::clamp<int64_t>(ROW_BYTES / (4 * row_floats), 1, STRETCHES);
  stretches = std::min(stretches, (pixels + op.depth - 1) / op.depth);
  int64_t rows = round(4 * stretches * row_floats), columns = round(4 * threads * op.units * kernels.columns);
  int64_t places = round(8 * threads * op.depth);
  std::unique_ptr<char, Free> memory(static_cast<char *>(std::aligned_alloc(64, rows + columns + places)));
  if (!memory)
    throw std::bad_alloc();
  op.rows = reinterpret_cast<float *>(memory.get());
  op.columns = reinterpret_cast<float *>(memory.get() + rows);
  op.places = reinterpret_cast<int64_t *>(memory.get() + rows + columns);
  Job job{op, kernels, stretches, row_floats};
  run_shared(threads, body, &job);
}

} // namespace inception_fast::cpu
