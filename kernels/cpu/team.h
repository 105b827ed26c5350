// Threads that run one function together, kept between calls.
//
// Every running call leases a team of its own, so calls do not wait for each other. Its threads are those of the OpenMP
// runtime that the process has loaded (openmp.h), so that another library's are not in the way; else its own, which
// spin briefly for the next call or the next barrier and then sleep. A forked child makes new teams, of their own
// threads.
#pragma once

#include "spec.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace inception_fast::cpu {

// Cores this process may use.
int available_cores();

// The core that the calling thread runs on; -1 where the system does not tell.
int this_core();

// Moves the calling thread away from `core` to another one that it may use, and allows it the same cores as before.
// Nothing happens where it has no other, or is elsewhere. For workers that find themselves on their caller's core: a
// thread that wakes while another library's still spins is put there, and the scheduler may leave it for milliseconds.
void leave_core(int core);

// Rounding and denormal modes are per thread; workers take their caller's.
unsigned float_mode();
void set_float_mode(unsigned mode);

// A counter that threads wait on: spinning first, asleep afterwards.
class Signal {
public:
  uint64_t value() const { return value_.load(std::memory_order_acquire); }
  void set(uint64_t value);
  // Returns the new value once it differs from `old`.
  uint64_t wait(uint64_t old, int spins);

private:
  std::atomic<uint64_t> value_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable condition_;
};

class Barrier {
public:
  // Only between runs, when no thread waits.
  void reset(int count, int spins);
  void wait();

private:
  std::atomic<int> left_{0};
  int count_ = 0;
  int spins_ = 0;
  Signal passed_;
};

struct Scratch {
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  unsigned char *data;
  size_t bytes;
};

class Team {
public:
  using Body = void (*)(void *context, const Worker &worker, Barrier &barrier);

  // Threads and working memory for calls of this size. Raises std::system_error when the system gives no thread.
  void reserve(int threads, size_t scratch_bytes);
  // Runs body on `threads` threads, or on fewer where OpenMP gives no more, this one being worker 0, and returns when
  // all are done. The body must not throw.
  void run(int threads, Body body, void *context);
  int threads() const { return static_cast<int>(scratch_.size()); }

private:
  void serve(int index, uint64_t seen);
  void work(int index);
  static void work_openmp(void *team);

  std::vector<std::unique_ptr<Scratch>> scratch_;
  int started_ = 0; // threads besides the caller
  Signal command_;  // serial << 16 | threads of the current call
  Barrier barrier_;
  Body body_ = nullptr;
  void *context_ = nullptr;
  int count_ = 0;
  int core_ = -1; // the caller's, when the run began
  unsigned float_mode_ = 0;
};

// A team for the time of one call.
class Lease {
public:
  Lease(int threads, size_t scratch_bytes);
  ~Lease();
  Lease(const Lease &) = delete;
  Lease &operator=(const Lease &) = delete;
  Team *operator->() const { return team_; }

private:
  Team *team_;
};

constexpr int MAX_THREADS = 1024;

} // namespace inception_fast::cpu
