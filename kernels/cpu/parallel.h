// One function on several threads: those of the OpenMP runtime that the process has loaded already, else a team's.
//
// Kernels that take turns with another library's must share its threads: two pools would fight for the same cores,
// since the threads of either spin for a while after their work. OpenMP's functions are looked up, never linked
// against.
#pragma once

#include "spec.h"

namespace inception_fast::cpu {

// Waits until all threads of the function are there.
struct Meeting {
  void (*wait)(void *barrier);
  void *barrier;

  void operator()() const { wait(barrier); }
};

using Shared = void (*)(void *context, const Worker &worker, const Meeting &meet);

// Runs `body` on up to `threads` threads and returns when all are done. The body must not throw.
void run_shared(int threads, Shared body, void *context);

} // namespace inception_fast::cpu
