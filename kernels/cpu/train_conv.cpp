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
constexpr int32_t SHARE = 64;             // channels of a panel that a thread packs at a time

// The tier whose float32 kernels a tier has, and how they want their weights.
struct Kernels {
  const Tier *tier;
  const TrainWeightsTier *weights;
};

Kernels kernels_of(const Tier &tier) {
#ifdef INCEPTION_FAST_X86
  if (&tier == &avx2_tier)
    return {&avx2_tier, &avx2_train_weights};
  if (&tier == &avx512_tier || &tier == &avx512_bf16_tier || &tier == &amx_bf16_tier)
    return {&avx512_tier, &avx512_train_weights};
#endif
  if (&tier == &generic_tier || &tier == &amx_emulated_tier)
    return {&generic_tier, &generic_train_weights};
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
  int32_t least = std::min({op.n, op.h, op.w, op.c, op.oc, op.kh, op.kw, op.oh, op.ow});
  expect(least >= 1 && threads >= 1, "a size of " + text(least) + " on " + text(threads) + " threads", "1 or more");
  constexpr int64_t most = INT32_MAX;
  expect(op.x_pitch >= op.c && op.y_pitch >= op.oc && std::max(op.x_pitch, op.y_pitch) <= most,
         "pixels " + text(op.x_pitch) + " and " + text(op.y_pitch) + " floats apart",
         "from " + text(op.c) + " and " + text(op.oc) + " to " + text(most));
  bool tile = false;
  std::string allowed;
  for (const WinogradTile &t : winograd_tiles()) {
    tile = tile || (t.kh == op.kh && t.kw == op.kw && t.h == op.tile_h && t.w == op.tile_w);
    allowed += (allowed.empty() ? "" : ", ") + text(t.h) + "x" + text(t.w) + " for " + text(t.kh) + "x" + text(t.kw);
  }
  expect(tile, "tile " + text(op.tile_h) + "x" + text(op.tile_w) + " for kernel " + text(op.kh) + "x" + text(op.kw),
         allowed);
}

struct Job {
  const TrainConvOp &from;
  const Kernels &kernels;
  ConvOp op;
  std::vector<Panel> panels;
  size_t packed_bytes, scratch_bytes; // scratch of one worker
  unsigned char *memory;
};

void schedule(Job &job) {
  const TrainConvOp &from = job.from;
  const Tier &tier = *job.kernels.tier;
  ConvOp &op = job.op;
  op.n = from.n, op.h = from.h, op.w = from.w, op.c = from.c, op.oc = from.oc, op.kh = from.kh, op.kw = from.kw;
  op.stride_h = op.stride_w = op.groups = 1;
  op.top = from.top, op.left = from.left, op.oh = from.oh, op.ow = from.ow;
  op.tile_h = from.tile_h, op.tile_w = from.tile_w;
  op.y_map = int64_t(op.oh) * op.ow, op.y_row = op.ow;
  op.x = {0, 0, op.c, static_cast<int32_t>(from.x_pitch), Type::float32};
  op.residual.buffer = -1;
  op.residual_scale = 1.0f;
  lay_out_points(op);
  View y{1, 0, op.oc, static_cast<int32_t>(from.y_pitch), Type::float32};
  job.panels = panels_of(op, {{y, false}}, tier.lanes);
  op.panels = job.panels.data(), op.panel_count = static_cast<int32_t>(job.panels.size());
  op.by_panel = winograd_tile_count(op) < tier.rows; // panels would have every thread transform every tile
  auto whole = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
  job.packed_bytes = whole(sizeof(float) * packed_size(op, job.panels, tier.lanes));
  job.scratch_bytes = whole(tier.winograd_scratch(op));
}

void pack(const Job &job, const Worker &worker) {
  const ConvOp &op = job.op;
  int64_t shares = (op.c + SHARE - 1) / SHARE, items = shares * op.panel_count;
  for (int64_t i = items * worker.index / worker.count; i < items * (worker.index + 1) / worker.count; ++i) {
    const Panel &panel = op.panels[i / shares];
    int32_t low = static_cast<int32_t>(i % shares) * SHARE;
    float *to = reinterpret_cast<float *>(job.memory) + panel.packed;
    job.kernels.weights->pack(job.from, panel, low, std::min(op.c, low + SHARE), to);
    if (low > 0)
      continue;
    int columns = panel.vectors * job.kernels.tier->lanes;
    float *tail = to + op.kh * op.kw / op.row_taps * op.row_depth * columns; // scale, shift
    std::fill_n(tail, columns, 1.0f);
    std::fill_n(tail + columns, columns, 0.0f);
  }
}

void body(void *pointer, const Worker &worker, const Meeting &meet) {
  const Job &job = *static_cast<Job *>(pointer);
  pack(job, worker);
  meet();
  void *bases[] = {const_cast<float *>(job.from.x), job.from.y};
  Call call{bases, nullptr, nullptr};
  Worker with{worker.index, worker.count, job.memory + job.packed_bytes + worker.index * job.scratch_bytes};
  job.kernels.tier->winograd(job.op, call, with);
}

} // namespace

void train_conv(const Tier &tier, const TrainConvOp &from, int threads) {
  check(from, threads);
  Kernels kernels = kernels_of(tier);
  Job job{from, kernels, {}, {}, 0, 0, nullptr};
  schedule(job);
  Workspace memory(job.packed_bytes + threads * job.scratch_bytes);
  job.memory = memory.data();
  job.op.packed = reinterpret_cast<float *>(job.memory);
  run_shared(threads, body, &job);
}

} // namespace inception_fast::cpu
