// Where the time of a convolution's block goes, in a build that asks for it (-DINCEPTION_FAST_MARKS, the target
// hopper_marks): its first block's threads that fill the ring, and one of each warpgroup that multiplies, note the
// cycle at which they pass certain places. In any other build nothing is left of it.
#pragma once

#include <cstdint>
#include <vector>

#include "schedule.h"

namespace inception_fast::hopper {

// Places, and, of SPENT, cycles in place of one: how long the thread has waited for stages since its last mark. Who
// fills the ring: TILE, then READY ahead of the first copy, then SPENT and END. Who multiplies: TILE, TURN when its
// turn has come, then SPENT and ISSUED behind the last products, SUMS when they have ended, STORED. Who
// stores for others, or pools: TILE, TURN when results are there, STORED. Who leaves sums in a ring that is pooled has
// its TURN behind SUMS, when its place is free.
enum class Passed : uint32_t { TILE = 1, READY, END, TURN, SPENT, ISSUED, SUMS, STORED };
constexpr int MARKED_THREADS = 6; // x, weights, four warpgroups, or two and those who store or pool for them
constexpr int MARKS = 2048;       // of a thread

#if defined(INCEPTION_FAST_MARKS) && defined(__CUDACC__)

struct PassedAt {
  uint32_t kind, cycles;
};
static __device__ PassedAt device_marks[MARKED_THREADS][MARKS]; // of the kernels of one source file

std::vector<const void *> &all_marks(); // of every source file
static const bool marks_are_known = (all_marks().push_back(device_marks), true);

class Marks {
public:
  __device__ __forceinline__ Marks(int who, bool marks) : to_(device_marks[who]), left_(marks ? MARKS - 1 : 0) {}

  __device__ __forceinline__ void at(Passed kind) {
    if (left_ > 0)
      put(kind, cycle());
    if (kind == Passed::END || kind == Passed::STORED)
      put_end();
  }
  __device__ __forceinline__ void waits() { begin_ = cycle(); }
  __device__ __forceinline__ void goes_on() { spent_ += cycle() - begin_; }
  __device__ __forceinline__ void spent() {
    if (left_ > 0)
      put(Passed::SPENT, spent_);
    spent_ = 0;
  }

private:
  static __device__ __forceinline__ uint32_t cycle() {
    uint32_t now;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
    return now;
  }
  __device__ __forceinline__ void put(Passed kind, uint32_t cycles) {
    *to_++ = {static_cast<uint32_t>(kind), cycles};
    --left_;
  }
  __device__ __forceinline__ void put_end() { // what an earlier launch left begins behind this
    if (left_ > 0)
      *to_ = {0, 0};
  }

  PassedAt *to_;
  int left_;
  uint32_t begin_ = 0, spent_ = 0;
};

#else

class Marks {
public:
  HOST_DEVICE Marks(int, bool) {}
  HOST_DEVICE void at(Passed) {}
  HOST_DEVICE void waits() {}
  HOST_DEVICE void goes_on() {}
  HOST_DEVICE void spent() {}
};

#endif

} // namespace inception_fast::hopper
