#include "parallel.h"

#include "openmp.h"
#include "team.h"

namespace inception_fast::cpu {

namespace {

struct Job {
  Shared body;
  void *context;
  int core; // the caller's, as is the mode
  unsigned float_mode;
};

void run_openmp(void *pointer) {
  const Job &job = *static_cast<Job *>(pointer);
  const OpenMp &runtime = openmp();
  Meeting meet{[](void *) { openmp().barrier(); }, nullptr};
  if (runtime.index() > 0 && runtime.count() <= available_cores())
    leave_core(job.core);
  unsigned mode = float_mode();
  set_float_mode(job.float_mode);
  job.body(job.context, Worker{runtime.index(), runtime.count(), nullptr}, meet);
  set_float_mode(mode); // another library's threads are given back as they were
}

void run_team(void *pointer, const Worker &worker, Barrier &barrier) {
  const Job &job = *static_cast<Job *>(pointer);
  Meeting meet{[](void *at) { static_cast<Barrier *>(at)->wait(); }, &barrier};
  job.body(job.context, worker, meet);
}

} // namespace

void run_shared(int threads, Shared body, void *context) {
  Job job{body, context, this_core(), float_mode()};
  if (threads <= 1) {
    body(context, Worker{0, 1, nullptr}, Meeting{[](void *) {}, nullptr});
  } else if (openmp()) {
    openmp().parallel(run_openmp, &job, static_cast<unsigned>(threads), 0);
  } else {
    Lease team(threads, 0);
    team->run(threads, run_team, &job);
  }
}

} // namespace inception_fast::cpu
