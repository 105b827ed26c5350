#include "plan.h"

#include "amx.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <new>
#include <stdexcept>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace inception_fast::cpu {

alignas(64) const float ZEROS[2 * CHUNK] = {};

const std::vector<const Tier *> &runnable_tiers() {
  static const std::vector<const Tier *> tiers = [] {
    std::vector<const Tier *> found{&generic_tier};
#ifdef INCEPTION_FAST_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      found.push_back(&avx2_tier);
      if (__builtin_cpu_supports("avx512f"))
        found.push_back(&avx512_tier);
      if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512bf16"))
        found.push_back(&avx512_bf16_tier);
      if (found.back() == &avx512_bf16_tier && amx_allowed() && amx_multiplies())
        found.push_back(&amx_bf16_tier);
    }
#endif
    return found;
  }();
  return tiers;
}

const std::vector<const Tier *> &emulated_tiers() {
  static const std::vector<const Tier *> tiers{&amx_emulated_tier};
  return tiers;
}

Memory::Memory(size_t bytes) : bytes_(bytes) {
  constexpr size_t PAGE = size_t(2) << 20;
  size_t page = bytes < PAGE ? 64 : PAGE, size = std::max(page, (bytes + page - 1) / page * page);
  data_.reset(static_cast<float *>(std::aligned_alloc(page, size)));
  if (!data_)
    throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (page == PAGE)
    madvise(data_.get(), size, MADV_HUGEPAGE);
#endif
}

void Memory::Free::operator()(float *p) const { std::free(p); }

void Plan::check(const std::vector<Input> &inputs, const std::vector<void *> &outputs, const void *arena,
                 int threads) const {
  auto expect = [](bool condition, const std::string &seen, const std::string &allowed) {
    if (!condition)
      throw std::invalid_argument(seen + "; allowed: " + allowed);
  };
  size_t output_count = std::count_if(buffers_.begin(), buffers_.end(),
                                      [](const Buffer &buffer) { return buffer.kind == BufferKind::output; });
  expect(inputs.size() == inputs_.size(), std::to_string(inputs.size()) + " inputs", std::to_string(inputs_.size()));
  expect(outputs.size() == output_count, std::to_string(outputs.size()) + " outputs", std::to_string(output_count));
  expect(threads >= 1 && threads <= MAX_THREADS, std::to_string(threads) + " threads",
         "1 to " + std::to_string(MAX_THREADS));
  expect(arena_bytes_ == 0 || arena != nullptr, "a null arena",
         "a pointer to " + std::to_string(arena_bytes_) + " bytes");
  expect(arena_bytes_ == 0 || reinterpret_cast<uintptr_t>(arena) % 64 == 0, "an arena that is not 64-byte aligned",
         "64-byte aligned");
  for (const Buffer &buffer : buffers_) {
    if (buffer.kind == BufferKind::arena || buffer.kind == BufferKind::local || buffer.bytes() == 0)
      continue;
    std::string name = (buffer.kind == BufferKind::input ? "input " : "output ") + std::to_string(buffer.position);
    if (buffer.kind == BufferKind::output) {
      expect(outputs[buffer.position] != nullptr, name + " is null", "a pointer");
      continue;
    }
    const Input &x = inputs[buffer.position];
    int64_t c = buffer.c, w = buffer.w, h = buffer.h;
    bool dense =
        (c == 1 || x.c == 1) && (w == 1 || x.w == c) && (h == 1 || x.h == w * c) && (buffer.n == 1 || x.n == h * w * c);
    expect(x.type == buffer.type && dense, name + " is of another type or not dense in NHWC order",
           "dense and of its buffer's type, as no import step takes it");
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Shape &s = inputs_[i];
    expect(inputs[i].data != nullptr || int64_t(s.n) * s.c * s.h * s.w == 0, "input " + std::to_string(i) + " is null",
           "a pointer");
  }
}

static size_t item_bytes(Type type) { return type == Type::float32 ? 4 : type == Type::bfloat16 ? 2 : 1; }

struct Plan::Job {
  const Plan &plan;
  std::vector<void *> bases; // of every buffer, at the first image; then room for each worker's own
  std::vector<Input> inputs; // likewise
  Times times;

  // What a worker's operators see when the first of their images is this one.
  Call call(const Worker &worker, int32_t image) {
    size_t count = plan.buffers_.size(), sources = plan.inputs_.size();
    void **own = bases.data() + (worker.index + 1) * count;
    Input *from = inputs.data() + (worker.index + 1) * sources;
    for (size_t i = 0; i < count; ++i) {
      const Buffer &buffer = plan.buffers_[i];
      int64_t each = buffer.n ? buffer.bytes() / buffer.n : 0;
      if (buffer.kind != BufferKind::local && each)
        own[i] = static_cast<char *>(bases[i]) + held_at(image, buffer.n) * each;
    }
    for (size_t i = 0; i < sources; ++i) {
      from[i] = inputs[i];
      from[i].data =
          static_cast<const char *>(inputs[i].data) + image * inputs[i].n * int64_t(item_bytes(inputs[i].type));
    }
    return {own, from, nullptr};
  }
};

namespace {

using Clock = std::chrono::steady_clock;

// Seconds that the calling thread had a core.
double busy_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

void run_op(const Tier &tier, const Op &op, const Call &call, const Worker &worker) {
  struct Visitor {
    const Tier &tier;
    const Call &call;
    const Worker &worker;
    void operator()(const ConvOp &op) const {
      auto kernel = op.tile_h > 0 ? tier.winograd->conv : op.depthwise ? tier.depthwise : tier.conv;
      kernel(op, call, worker);
    }
    void operator()(const PairOp &op) const { tier.pair(op, call, worker); }
    void operator()(const PoolOp &op) const { tier.pool(op, call, worker); }
    void operator()(const EltwiseOp &op) const { tier.eltwise(op, call, worker); }
    void operator()(const ImportOp &op) const { tier.import(op, call, worker); }
    void operator()(const LrnOp &op) const { tier.lrn(op, call, worker); }
    void operator()(const NormalizeOp &op) const { tier.normalize(op, call, worker); }
  };
  std::visit(Visitor{tier, call, worker}, op.kernel);
}

} // namespace

void Plan::body(void *pointer, const Worker &worker, Barrier &barrier) {
  Job &job = *static_cast<Job *>(pointer);
  const Plan &plan = job.plan;
  Clock::time_point before = Clock::now();
  for (const Run &run : plan.runs_) {
    Call call = job.call(worker, run.image);
    for (int i = run.first; i < run.last; ++i) {
      const Op &op = plan.ops_[i];
      if (worker.count > 1 && op.fence)
        barrier.wait();
      double began = job.times.shares ? busy_seconds() : 0.0;
      if (!op.serial)
        run_op(*plan.tier_, op, call, worker);
      else if (worker.index == 0)
        run_op(*plan.tier_, op, call, Worker{0, 1, worker.scratch});
      if (job.times.shares)
        job.times.shares[int64_t(worker.index) * plan.steps() + op.step] += busy_seconds() - began;
      bool step_ends = i + 1 == run.last || plan.ops_[i + 1].step != op.step;
      if (job.times.steps && step_ends) {
        barrier.wait();
        Clock::time_point now = Clock::now();
        if (worker.index == 0)
          job.times.steps[op.step] += std::chrono::duration<double>(now - before).count();
        before = now;
      }
    }
  }
}

void Plan::run(const std::vector<Input> &inputs, const std::vector<void *> &outputs, void *arena, int threads,
               Times times) const {
  check(inputs, outputs, arena, threads);
  bool alone = std::all_of(ops_.begin(), ops_.end(), [](const Op &op) { return op.serial; });
  int count = alone ? 1 : threads;
  std::vector<void *> bases((count + 1) * buffers_.size());
  for (size_t i = 0; i < buffers_.size(); ++i) {
    const Buffer &buffer = buffers_[i];
    if (buffer.kind == BufferKind::arena)
      bases[i] = static_cast<char *>(arena) + buffer.position;
    else if (buffer.kind == BufferKind::local)
      bases[i] = nullptr;
    else if (buffer.kind == BufferKind::output)
      bases[i] = outputs[buffer.position];
    else
      bases[i] = const_cast<void *>(inputs[buffer.position].data); // the ledger forbids writing it
  }
  std::vector<Input> from(inputs);
  from.resize((count + 1) * inputs.size());
  if (times.steps)
    std::fill_n(times.steps, steps(), 0.0);
  if (times.shares)
    std::fill_n(times.shares, int64_t(threads) * steps(), 0.0);
  Job job{*this, std::move(bases), std::move(from), times};
  Lease team(count, scratch_bytes_);
  team->run(count, &Plan::body, &job);
}

} // namespace inception_fast::cpu
