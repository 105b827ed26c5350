// Fibers, the order in which they run, launches, and how a fault ends one.
#include "machine.h"
#include "primitives.h"
#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <sys/mman.h>

namespace inception_fast::emulated {

namespace {
constexpr size_t kStack = 64 << 10;
std::vector<char *> spare_stacks;

char *new_stack() {
  if (!spare_stacks.empty()) {
    char *stack = spare_stacks.back();
    spare_stacks.pop_back();
    return stack;
  }
  void *memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED)
    fail("no memory for a thread's stack");
  return static_cast<char *>(memory);
}

void enter(Fiber &fiber) {
  Machine &m = machine();
  m.current = &fiber;
  ::threadIdx = fiber.thread_index;
  ::blockIdx = fiber.cta->block_index;
  m.switches++;
}

void leave() {
  Machine &m = machine();
  Fiber &fiber = self();
  if (!_setjmp(fiber.here))
    _longjmp(m.scheduler, 1);
}

void trampoline() {
  Machine &m = machine();
  m.kernel();
  finish_thread(self());
  self().done = true;
  self().cta->finished++;
  _longjmp(m.scheduler, 1);
}

void resume(Fiber &fiber) {
  Machine &m = machine();
  enter(fiber);
  if (_setjmp(m.scheduler))
    return;
  if (fiber.started)
    _longjmp(fiber.here, 1);
  fiber.started = true;
  fiber.stack = new_stack();
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = fiber.stack;
  fiber.entry.uc_stack.ss_size = kStack;
  fiber.entry.uc_link = nullptr;
  makecontext(&fiber.entry, trampoline, 0);
  setcontext(&fiber.entry);
}

bool can_run(const Fiber &fiber) { return !fiber.done && (!fiber.wait.ready || fiber.wait.ready(fiber)); }

std::string place_of(const Fiber &fiber) {
  char text[96];
  const uint3 &b = fiber.cta->block_index;
  snprintf(text, sizeof text, "CTA (%u, %u, %u) thread %d", b.x, b.y, b.z, fiber.index);
  return text;
}

// "nobody can run", with what each warp waits for: threads of a warp that wait for the same are named once.
[[noreturn]] void report_deadlock() {
  machine().current = nullptr;
  std::string text = "deadlock: no thread can run";
  int lines = 0;
  for (auto &cluster : machine().running)
    for (auto &cta : cluster->ctas) {
      std::map<std::string, std::vector<int>> waiting;
      for (auto &fiber : cta->fibers)
        if (!fiber->done)
          waiting[fiber->wait.describe ? fiber->wait.describe(*fiber) : "?"].push_back(fiber->index);
      for (auto &[what, who] : waiting)
        if (++lines <= 24) {
          char line[256];
          snprintf(line, sizeof line, "; CTA (%u, %u, %u) threads %d..%d (%zu): %s", cta->block_index.x,
                   cta->block_index.y, cta->block_index.z, who.front(), who.back(), who.size(), what.c_str());
          text += line;
        }
    }
  fail("%s", text.c_str());
}

void land_one() {
  Machine &m = machine();
  m.current = nullptr;
  auto flight = m.flights.begin();
  if (m.options.copies == int(When::random))
    std::advance(flight, m.random() % m.flights.size());
  auto land = std::move(flight->land);
  m.flights.erase(flight);
  land();
}

// Which threads of a block a schedule lets run last.
bool starves(int schedule, int thread) {
  return schedule >= kLateThread ? thread == schedule - kLateThread : thread / kWarp == schedule - kLateWarp;
}

// Threads in turn: every thread that can runs until it waits, those that are starved not yet. Returns whether any ran.
bool round_of_turns(int schedule) {
  bool any = false;
  for (auto &cluster : machine().running)
    for (auto &cta : cluster->ctas)
      for (auto &fiber : cta->fibers)
        if (!starves(schedule, fiber->index) && can_run(*fiber)) {
          resume(*fiber);
          any = true;
        }
  return any;
}

// Random priorities of warps: the first warp that can runs, and now and then its priority changes.
bool step_of_priorities() {
  Machine &m = machine();
  std::vector<std::pair<uint64_t, std::pair<Cta *, int>>> order;
  for (auto &cluster : m.running)
    for (auto &cta : cluster->ctas)
      for (size_t w = 0; w < cta->warps.size(); w++)
        order.push_back({cta->warps[w].priority, {cta.get(), int(w)}});
  std::sort(order.begin(), order.end());
  for (auto &[priority, at] : order) {
    auto [cta, w] = at;
    bool any = false;
    int first = int(m.random() % kWarp);
    for (int i = 0; i < kWarp; i++) {
      size_t index = size_t(w) * kWarp + (first + i) % kWarp;
      if (index < cta->fibers.size() && can_run(*cta->fibers[index])) {
        resume(*cta->fibers[index]);
        any = true;
      }
    }
    if (any) {
      if (chance(8))
        cta->warps[w].priority = m.random();
      return true;
    }
  }
  return false;
}

void retire() {
  Machine &m = machine();
  for (auto cluster = m.running.begin(); cluster != m.running.end();) {
    bool done = true;
    for (auto &cta : (*cluster)->ctas)
      done &= cta->finished == int(cta->fibers.size());
    if (!done) {
      ++cluster;
      continue;
    }
    if (!m.flights.empty() && m.running.size() == 1)
      fail("a CTA ended with a copy still on its way into its shared memory");
    for (auto &cta : (*cluster)->ctas) {
      for (auto &fiber : cta->fibers)
        spare_stacks.push_back(fiber->stack);
      munmap(cta->shared - 16, kSharedLimit + 16);
      munmap(cta->seen - 16, kSharedLimit + 16);
    }
    cluster = m.running.erase(cluster);
  }
}

uint8_t *new_shared(uint32_t bytes) {
  void *memory = mmap(nullptr, kSharedLimit + 16, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED)
    fail("no memory for %u bytes of shared memory", bytes);
  uint8_t *shared = static_cast<uint8_t *>(memory) + 16; // aligned as kSharedBase is
  std::memset(shared, kPoisonByte, bytes);
  return shared;
}

std::unique_ptr<Cta> new_cta(Cluster *cluster, int rank, uint3 index, uint32_t shared_bytes) {
  Machine &m = machine();
  auto cta = std::make_unique<Cta>();
  cta->cluster = cluster;
  cta->rank = rank;
  cta->block_index = index;
  cta->shared_bytes = shared_bytes;
  cta->shared = new_shared(shared_bytes);
  cta->seen = new_shared(shared_bytes);
  cta->barriers.resize(shared_bytes / 8 + 1);
  cta->stored.resize(shared_bytes / 16 + 1);
  int threads = int(m.block.x * m.block.y * m.block.z);
  cta->warps.resize((threads + kWarp - 1) / kWarp);
  cta->groups.resize((threads + kGroup - 1) / kGroup);
  for (auto &warp : cta->warps)
    warp.priority = m.random();
  for (int t = 0; t < threads; t++) {
    auto fiber = std::make_unique<Fiber>();
    fiber->cta = cta.get();
    fiber->index = t;
    fiber->thread_index = {t % m.block.x, t / m.block.x % m.block.y, t / m.block.x / m.block.y};
    cta->fibers.push_back(std::move(fiber));
  }
  return cta;
}

void start_cluster(uint64_t index, uint32_t shared_bytes) {
  Machine &m = machine();
  dim3 &c = m.cluster_size;
  unsigned across = m.grid.x / c.x, down = m.grid.y / c.y;
  uint3 first = {unsigned(index % across) * c.x, unsigned(index / across % down) * c.y,
                 unsigned(index / across / down) * c.z};
  auto cluster = std::make_unique<Cluster>();
  for (unsigned r = 0; r < c.x * c.y * c.z; r++) {
    uint3 at = {first.x + r % c.x, first.y + r / c.x % c.y, first.z + r / c.x / c.y};
    cluster->ctas.push_back(new_cta(cluster.get(), int(r), at, shared_bytes));
  }
  m.running.push_back(std::move(cluster));
}

void run_grid(uint32_t shared_bytes) {
  Machine &m = machine();
  uint64_t clusters =
      uint64_t(m.grid.x) * m.grid.y * m.grid.z / (m.cluster_size.x * m.cluster_size.y * m.cluster_size.z);
  uint64_t next = 0;
  while (next < clusters || !m.running.empty()) {
    while (next < clusters && int(m.running.size()) < std::max(1, m.options.resident))
      start_cluster(next++, shared_bytes);
    bool ran = m.options.schedule == 1 ? step_of_priorities() : round_of_turns(m.options.schedule);
    if (!m.flights.empty() && (!ran || (m.options.copies == int(When::random) && chance(4)))) {
      land_one();
      ran = true;
    }
    if (!m.due.empty() && (!ran || (m.options.products == int(When::random) && chance(4))))
      ran |= run_due_products();
    if (!ran && m.options.schedule >= kLateWarp)
      ran = round_of_turns(0);
    retire();
    if (!ran && !m.running.empty())
      report_deadlock();
  }
}

void on_fault(int, siginfo_t *info, void *) {
  const char *where = in_the_gap_of_a_block(info->si_addr) ? "just outside of a block of global memory"
                                                           : "at no block of global memory";
  fail("access to %p, %s", info->si_addr, where);
}

} // namespace

Machine &machine() {
  static Machine one;
  return one;
}

Fiber &self() {
  if (!machine().current)
    fail("a device function was called outside of a kernel");
  return *machine().current;
}

void fail(const char *format, ...) {
  Machine &m = machine();
  char text[8192];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  m.error = (m.current ? place_of(*m.current) + ": " : std::string()) + text;
  _longjmp(m.failure, 1);
}

uint32_t offset_of(const void *pointer, uint32_t bytes, const char *what) {
  const Cta &cta = *self().cta;
  ptrdiff_t offset = static_cast<const uint8_t *>(pointer) - cta.shared;
  if (offset < 0 || offset + ptrdiff_t(bytes) > ptrdiff_t(cta.shared_bytes))
    fail("%s: %u bytes at offset %td of %u bytes of shared memory", what, bytes, offset, cta.shared_bytes);
  return uint32_t(offset);
}

uint32_t offset_of_address(uint32_t address, uint32_t bytes, const char *what) {
  const Cta &cta = *self().cta;
  int64_t offset = int64_t(address) - kSharedBase;
  if (offset < 0 || offset + bytes > cta.shared_bytes)
    fail("%s: %u bytes at offset %lld of %u bytes of shared memory", what, bytes, static_cast<long long>(offset),
         cta.shared_bytes);
  return uint32_t(offset);
}

bool chance(unsigned one_in) { return machine().random() % one_in == 0; }

bool immediately(int when) { return when == int(When::early) || (when == int(When::random) && chance(2)); }

void block_until(const Wait &wait) {
  Fiber &fiber = self();
  fiber.wait = wait;
  if (machine().options.schedule == 1 && chance(2))
    leave();
  while (!wait.ready(fiber))
    leave();
  fiber.wait = {};
}

void maybe_yield() {
  if (machine().options.schedule == 1 && chance(16))
    leave();
}

void yield_once() { leave(); }

uint64_t switches() { return machine().switches; }

void trap() { fail("trap"); }

int multiprocessors() { return machine().options.sms; }

uint8_t *dynamic_shared() { return self().cta->shared + (1024 - kSharedBase % 1024) % 1024; }

uint32_t shared_address(const void *pointer) { return kSharedBase + offset_of(pointer, 0, "shared_address"); }

int launch_grid(dim3 grid, dim3 block, dim3 cluster, uint32_t shared_bytes, const std::function<void()> &kernel) {
  Machine &m = machine();
  m.grid = grid;
  m.block = block;
  m.cluster_size = cluster;
  m.kernel = kernel;
  m.random.seed(m.options.seed);
  m.flights.clear();
  m.running.clear();
  m.due.clear();
  m.current = nullptr;
  m.error.clear();
  m.early_loads = m.prefetches = 0;
  m.unordered.clear();
  ::gridDim = grid;
  ::blockDim = block;
  struct sigaction ours{}, before_segv{}, before_bus{};
  ours.sa_sigaction = on_fault;
  ours.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &ours, &before_segv);
  sigaction(SIGBUS, &ours, &before_bus);
  bool failed = false;
  if (_setjmp(m.failure))
    failed = true;
  else {
    if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z || !grid.x || !grid.y || !grid.z)
      fail("grid %ux%ux%u; allowed: whole clusters of %ux%ux%u", grid.x, grid.y, grid.z, cluster.x, cluster.y,
           cluster.z);
    if (block.x * block.y * block.z > 1024)
      fail("%u threads in a CTA; allowed: 1024", block.x * block.y * block.z);
    if (shared_bytes > kSharedLimit)
      fail("%u bytes of shared memory; allowed: %u", shared_bytes, kSharedLimit);
    if (cluster.x * cluster.y * cluster.z > 8)
      fail("a cluster of %u CTAs; allowed: 8", cluster.x * cluster.y * cluster.z);
    run_grid(shared_bytes);
  }
  sigaction(SIGSEGV, &before_segv, nullptr);
  sigaction(SIGBUS, &before_bus, nullptr);
  m.current = nullptr;
  earlier_grid_has_ended();
  if (failed)
    m.running.clear(); // the fibers' stacks and shared memory are given up with them
  return failed ? 1 : 0;
}

} // namespace inception_fast::emulated

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
