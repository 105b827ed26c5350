#include "team.h"

#include "openmp.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <thread>

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#ifdef INCEPTION_FAST_X86
#include <xmmintrin.h>
#endif

namespace inception_fast::cpu {

namespace {

// About 0.1 ms: longer than a step's imbalance, shorter than a scheduler's slice. Who yields meanwhile gives whatever
// else wants this core a whole slice, at every step; who sleeps comes back when it is woken.
constexpr int SPINS = 4000;

void pause() {
#ifdef INCEPTION_FAST_X86
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Threads of a team must not take the process's signals: Python wants them on its own threads.
class BlockedSignals {
public:
  BlockedSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

private:
  sigset_t before_;
};

struct Pool {
  std::mutex mutex;
  std::vector<Team *> idle;
};

// Never destroyed: its threads sleep until the process ends. A forked child has none of them, so it gets a pool of its
// own.
Pool *pool = nullptr;

void make_pool() { pool = new Pool; }

Pool &the_pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    make_pool();
    pthread_atfork(nullptr, nullptr, make_pool);
  });
  return *pool;
}

} // namespace

int available_cores() {
#ifdef __linux__
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

int this_core() {
#ifdef __linux__
  return sched_getcpu();
#else
  return -1;
#endif
}

void leave_core([[maybe_unused]] int core) {
#ifdef __linux__
  cpu_set_t allowed;
  if (core < 0 || core >= CPU_SETSIZE || sched_getcpu() != core || sched_getaffinity(0, sizeof allowed, &allowed) != 0)
    return;
  cpu_set_t others = allowed;
  CPU_CLR(core, &others);
  if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0)
    sched_setaffinity(0, sizeof allowed, &allowed);
#endif
}

unsigned float_mode() {
#ifdef INCEPTION_FAST_X86
  return _mm_getcsr();
#else
  return 0;
#endif
}

void set_float_mode([[maybe_unused]] unsigned mode) {
#ifdef INCEPTION_FAST_X86
  _mm_setcsr(mode);
#endif
}

void Signal::set(uint64_t value) {
  value_.store(value);
  if (sleepers_.load() > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    condition_.notify_all();
  }
}

uint64_t Signal::wait(uint64_t old, int spins) {
  for (int i = 0; i < spins; ++i) {
    uint64_t now = value();
    if (now != old)
      return now;
    pause();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  ++sleepers_;
  condition_.wait(lock, [&] { return value_.load() != old; });
  --sleepers_;
  return value_.load();
}

void Barrier::reset(int count, int spins) {
  count_ = count;
  spins_ = spins;
  left_.store(count);
}

void Barrier::wait() {
  // All is read before this thread counts as arrived: the last one may leave at once and reset the barrier.
  uint64_t round = passed_.value();
  int spins = spins_;
  if (left_.fetch_sub(1) == 1) {
    left_.store(count_);
    passed_.set(round + 1);
  } else {
    passed_.wait(round, spins);
  }
}

Scratch::Scratch(size_t size) : data(nullptr), bytes((size + 4095) / 4096 * 4096) {
  if (bytes == 0)
    return;
  data = static_cast<unsigned char *>(std::aligned_alloc(4096, bytes));
  if (data == nullptr)
    throw std::bad_alloc();
}

Scratch::~Scratch() { std::free(data); }

void Team::reserve(int threads, size_t scratch_bytes) {
  for (auto &scratch : scratch_)
    if (scratch->bytes < scratch_bytes)
      scratch = std::make_unique<Scratch>(scratch_bytes);
  while (static_cast<int>(scratch_.size()) < threads)
    scratch_.push_back(std::make_unique<Scratch>(scratch_bytes));
  if (openmp() || started_ >= threads - 1)
    return;
  BlockedSignals blocked;
  while (started_ < threads - 1) {
    std::thread(&Team::serve, this, started_ + 1, command_.value()).detach();
    ++started_;
  }
}

void Team::serve(int index, uint64_t seen) {
  for (;;) {
    seen = command_.wait(seen, index < available_cores() ? SPINS : 0);
    if (index < static_cast<int>(seen & 0xffff)) {
      if (count_ <= available_cores())
        leave_core(core_);
      work(index);
    }
  }
}

void Team::work(int index) {
  set_float_mode(float_mode_);
  body_(context_, Worker{index, count_, scratch_[index]->data}, barrier_);
  barrier_.wait();
}

void Team::work_openmp(void *pointer) {
  Team &team = *static_cast<Team *>(pointer);
  const int index = openmp().index(), count = openmp().count();
  if (index == 0 && count != team.count_) {
    team.count_ = count;
    team.barrier_.reset(count, count <= available_cores() ? SPINS : 0);
  }
  openmp().barrier();
  if (index > 0 && count <= available_cores())
    leave_core(team.core_);
  unsigned mode = float_mode();
  set_float_mode(team.float_mode_);
  team.body_(team.context_, Worker{index, count, team.scratch_[index]->data}, team.barrier_);
  set_float_mode(mode); // another library's threads are given back as they were
}

void Team::run(int threads, Body body, void *context) {
  body_ = body;
  context_ = context;
  count_ = threads;
  core_ = this_core();
  float_mode_ = float_mode();
  barrier_.reset(threads, threads <= available_cores() ? SPINS : 0);
  if (threads > 1 && openmp())
    return openmp().parallel(work_openmp, this, static_cast<unsigned>(threads), 0);
  if (threads > 1)
    command_.set(((command_.value() >> 16) + 1) << 16 | static_cast<uint64_t>(threads));
  work(0);
}

Lease::Lease(int threads, size_t scratch_bytes) : team_(nullptr) {
  Pool &from = the_pool();
  {
    std::lock_guard<std::mutex> lock(from.mutex);
    // The smallest team that is large enough, else the largest.
    auto better = [&](const Team *a, const Team *b) {
      bool a_fits = a->threads() >= threads, b_fits = b->threads() >= threads;
      if (a_fits != b_fits)
        return a_fits;
      return a_fits ? a->threads() < b->threads() : a->threads() > b->threads();
    };
    auto best = std::min_element(from.idle.begin(), from.idle.end(), better);
    if (best != from.idle.end()) {
      team_ = *best;
      from.idle.erase(best);
    }
  }
  if (team_ == nullptr)
    team_ = new Team;
  try {
    team_->reserve(threads, scratch_bytes);
  } catch (...) {
    std::lock_guard<std::mutex> lock(from.mutex);
    from.idle.push_back(team_);
    throw;
  }
}

Lease::~Lease() {
  Pool &to = the_pool();
  std::lock_guard<std::mutex> lock(to.mutex);
  to.idle.push_back(team_);
}

} // namespace inception_fast::cpu
