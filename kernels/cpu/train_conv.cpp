#include "train_conv.h"

#include "pack.h"
#include "parallel.h"
#include "plan.h"
#include "winograd_pack.h"

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace inception_fast::cpu {

namespace {

constexpr size_t KEPT = size_t(64) << 20; // bytes of working memory that stay between calls

// Of a tier: whose tiles it has and how they want their weights, and how its direct sums of bfloat16 want theirs.
struct Kernels {
  const Tier *tier, *tiles;
  const TrainWeightsTier *weights;
  const TrainPairsTier *pairs;
};

Kernels kernels_of(const Tier &tier) {
  const Kernels known[] = {
      {&generic_tier, &generic_tier, &generic_train_weights, &generic_train_pairs},
      {&amx_emulated_tier, &generic_tier, &generic_train_weights, &amx_emulated_train_pairs},
#ifdef INCEPTION_FAST_X86
      {&avx2_tier, &avx2_tier, &avx2_train_weights, &avx2_train_pairs},
      {&avx512_tier, &avx512_tier, &avx512_train_weights, &avx512_train_pairs},
      {&avx512_bf16_tier, &avx512_tier, &avx512_train_weights, &avx512_bf16_train_pairs},
      {&amx_bf16_tier, &avx512_tier, &avx512_train_weights, &avx512_bf16_train_pairs},
#endif
  };
  for (const Kernels &each : known)
    if (each.tier == &tier)
      return each;
  throw std::invalid_argument(std::string("tier '") + tier.name + "' has no convolution for training");
}

// Working memory of a call, kept for the next one.
class Workspace {
public:
  explicit Workspace(size_t bytes) {
    {
      std::lock_guard<std::mutex> lock(mutex());
      auto fits = [&](const std::unique_ptr<Memory> &m) { return m->bytes() >= bytes; };
      auto found = std::find_if(idle().begin(), idle().end(), fits);
      if (found != idle().end()) {
        memory_ = std::move(*found);
        idle().erase(found);
      }
    }
    if (!memory_)
      memory_ = std::make_unique<Memory>(bytes);
  }
  ~Workspace() {
    std::lock_guard<std::mutex> lock(mutex());
    auto smaller = [](const std::unique_ptr<Memory> &a, const std::unique_ptr<Memory> &b) {
      return a->bytes() < b->bytes();
    };
    auto &all = idle();
    all.insert(std::upper_bound(all.begin(), all.end(), memory_, smaller), std::move(memory_));
    size_t bytes = 0;
    for (const auto &each : all)
      bytes += each->bytes();
    for (; bytes > KEPT || all.size() > MOST; all.erase(all.begin()))
      bytes -= all.front()->bytes();
  }
  Workspace(const Workspace &) = delete;
  Workspace &operator=(const Workspace &) = delete;

  unsigned char *data() const { return reinterpret_cast<unsigned char *>(memory_->data()); }

private:
  static constexpr size_t MOST = 8;
  static std::mutex &mutex() {
    static std::mutex one;
    return one;
  }
  static std::vector<std::unique_ptr<Memory>> &idle() {
    static auto *all = new std::vector<std::unique_ptr<Memory>>; // lives as long as threads may call
    return *all;
  }
  std::unique_ptr<Memory> memory_;
};

void check(const TrainConvOp &op, int threads) {
  auto expect = [](bool condition, const std::string &seen, const std::string &allowed) {
    if (!condition)
      throw std::invalid_argument("a convolution in training with " + seen + "; allowed: " + allowed);
  };
  auto text = [](int64_t value) { return std::to_string(value); };
  int32_t least = std::min({op.n, op.h, op.w, op.c, op.oc, op.kh, op.kw, op.stride_h, op.stride_w, op.oh, op.ow});
  expect(least >= 1 && threads >= 1, "a size of " + text(least) + " on " + text(threads) + " threads", "1 or more");
  constexpr int64_t most = INT32_MAX;
  expect(op.x_pitch >= op.c && op.y_pitch >= op.oc && std::max(op.x_pitch, op.y_pitch) <= most,
         "pixels " + text(op.x_pitch) + " and " + text(op.y_pitch) + " elements apart",
         "from " + text(op.c) + " and " + text(op.oc) + " to " + text(most));
  bool tile = op.type == Type::bfloat16 && op.tile_h == 0 && op.tile_w == 0;
  std::string allowed = "0x0 for bfloat16; at stride 1";
  for (const WinogradTile &t : winograd_tiles()) {
    bool same = t.kh == op.kh && t.kw == op.kw && t.h == op.tile_h && t.w == op.tile_w;
    tile = tile || (op.stride_h == 1 && op.stride_w == 1 && same);
    allowed += ", " + text(t.h) + "x" + text(t.w) + " for " + text(t.kh) + "x" + text(t.kw);
  }
  expect(tile,
         "tile " + text(op.tile_h) + "x" + text(op.tile_w) + " for kernel " + text(op.kh) + "x" + text(op.kw) + " of " +
             (op.type == Type::float32 ? "float32" : "bfloat16") + " at stride " + text(op.stride_h) + "x" +
             text(op.stride_w),
         allowed);
}

struct Job {
  const TrainConvOp &from;
  const Kernels &kernels;
  const Tier &tier; // whose kernel runs
  ConvOp op;
  std::vector<Panel> panels;
  std::vector<Chunk> chunks;
  size_t packed_bytes, scratch_bytes; // scratch of one worker
  unsigned char *memory;
};

bool direct(const TrainConvOp &op) { return op.tile_h == 0; }

void schedule(Job &job) {
  const TrainConvOp &from = job.from;
  const Tier &tier = job.tier;
  ConvOp &op = job.op;
  op.n = from.n, op.h = from.h, op.w = from.w, op.c = from.c, op.oc = from.oc, op.kh = from.kh, op.kw = from.kw;
  op.stride_h = from.stride_h, op.stride_w = from.stride_w, op.groups = 1;
  op.top = from.top, op.left = from.left, op.oh = from.oh, op.ow = from.ow;
  op.tile_h = from.tile_h, op.tile_w = from.tile_w;
  op.y_map = int64_t(op.oh) * op.ow, op.y_row = op.ow;
  op.x = {0, 0, op.c, static_cast<int32_t>(from.x_pitch), from.type};
  op.residual.buffer = -1;
  op.residual_scale = 1.0f;
  op.skip = true;
  if (direct(from)) {
    walk_directly(op, from.left > 0, tier.rows);
    lay_out_rows(op, tier.k_multiple);
  } else {
    lay_out_points(op);
  }
  View y{1, 0, op.oc, static_cast<int32_t>(from.y_pitch), from.type};
  job.panels = panels_of(op, {{y, false}}, tier.lanes);
  job.chunks = chunks_of(from.type, op.c, op.kh * op.kw);
  op.panels = job.panels.data(), op.panel_count = static_cast<int32_t>(job.panels.size());
  op.chunks = job.chunks.data(), op.chunk_count = static_cast<int32_t>(job.chunks.size());
  auto whole = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
  job.packed_bytes = whole(sizeof(float) * packed_size(op, job.panels, tier.lanes));
  job.scratch_bytes = whole(direct(from) ? tier.conv_scratch(op) : tier.winograd->scratch(op));
}

// What of a panel's memory is not weights: scale and shift, and zeros behind rows of taps that a tile unit multiplies.
void finish_panel(const ConvOp &op, int columns, float *to) {
  int rows = op.kh * op.kw / op.row_taps;
  float *tail = to + rows * op.row_depth * columns;
  if (op.tile_h == 0) {
    tail = to + rows * op.row_depth / 2 * columns;
    int64_t held = int64_t(op.row_taps) * ((op.c + 1) / 2 * 2);
    for (int row = 0; row < rows; ++row)
      std::fill(to + (row * op.row_depth + held) / 2 * columns, to + (row + 1) * op.row_depth / 2 * columns, 0.0f);
  }
  std::fill_n(tail, columns, 1.0f);
  std::fill_n(tail + columns, columns, 0.0f);
}

void pack(const Job &job, const Worker &worker) {
  const ConvOp &op = job.op;
  int64_t shares = (op.c + SHARE - 1) / SHARE, items = shares * op.panel_count;
  for (int64_t i = items * worker.index / worker.count; i < items * (worker.index + 1) / worker.count; ++i) {
    const Panel &panel = op.panels[i / shares];
    int32_t low = static_cast<int32_t>(i % shares) * SHARE, high = std::min(op.c, low + SHARE);
    float *to = reinterpret_cast<float *>(job.memory) + panel.packed;
    if (direct(job.from))
      job.kernels.pairs->pack(job.from, op, panel, low, high, reinterpret_cast<bf16 *>(to));
    else
      job.kernels.weights->pack(job.from, panel, low, high, to);
    if (low == 0)
      finish_panel(op, panel.vectors * job.tier.lanes, to);
  }
}

void body(void *pointer, const Worker &worker, const Meeting &meet) {
  const Job &job = *static_cast<Job *>(pointer);
  pack(job, worker);
  meet();
  void *bases[] = {const_cast<void *>(job.from.x), job.from.y};
  Call call{bases, nullptr, nullptr};
  Worker with{worker.index, worker.count, job.memory + job.packed_bytes + worker.index * job.scratch_bytes};
  auto run = direct(job.from) ? job.tier.conv : job.tier.winograd->conv;
  run(job.op, call, with);
}

} // namespace

void train_conv(const Tier &tier, const TrainConvOp &from, int threads) {
  check(from, threads);
  Kernels kernels = kernels_of(tier);
  Job job{from, kernels, direct(from) ? tier : *kernels.tiles, {}, {}, {}, 0, 0, nullptr};
  schedule(job);
  Workspace memory(job.packed_bytes + threads * job.scratch_bytes);
  job.memory = memory.data();
  job.op.packed = reinterpret_cast<float *>(job.memory);
  run_shared(threads, body, &job);
}

} // namespace inception_fast::cpu
