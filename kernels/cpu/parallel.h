// One function on several threads: OpenMP's (openmp.h), else a team's.
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
